"""``venturi.json``: what an artefact is, where it came from and what that cost.

Imports no torch, so that a cache hit can be judged quickly.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compress.job import FORMAT_VERSION, Job
from compress.sources import MANIFEST_NAME


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """One linear layer: what is stored, what the engine is asked to compute, what was lost.

    ``method`` is what was asked for, ``kept`` what was the best of its contenders. Errors are
    None where they were not measured: ``relative_error`` of the weight, ``output_error`` and
    ``baseline_error`` (of RTN or magnitude) of the outputs on calibration inputs, squared.
    ``damping`` is the step of the Hessian's ladder; ``note`` says why a layer is not as asked for.
    """

    name: str
    storage: str
    execution: str
    method: str
    bits: float
    bytes: int
    relative_error: float | None = None
    clipped_share: float | None = None
    kept: str | None = None
    output_error: float | None = None
    baseline_error: float | None = None
    damping: str | None = None
    sparsity_wanted: float | None = None
    sparsity: float | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything but ``measured`` is a function of the sources, the recipe and the versions.

    ``summary`` counts layers by the method that was kept and by damping. ``files`` are the
    other files of the folder and their sizes in bytes, ``hashes`` the sha256 of those that tokens
    or logits depend on; ``measured`` holds times (seconds, a UTC time stamp) and memory (bytes).
    """

    key: str
    recipe: Mapping[str, Any]
    sources: Mapping[str, str]
    versions: Mapping[str, str]
    layers: tuple[LayerRow, ...]
    totals: Mapping[str, float]
    summary: Mapping[str, Mapping[str, int]]
    calibration: Mapping[str, Any] | None
    runtime: Mapping[str, str]
    files: Mapping[str, int]
    hashes: Mapping[str, str]
    measured: Mapping[str, Any] = field(compare=False)

    def write(self, folder: Path) -> None:
        """Writes ``venturi.json``. Raises ``OSError``."""
        text = json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2)
        (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def recipe_record(job: Job) -> dict[str, Any]:
    """The manifest's ``recipe``: name, hash, and the recipe as resolved with its gate."""
    recipe = job.recipe
    resolved = json.loads(recipe.canonical_json()) | {"gate": asdict(recipe.gate)}
    return {"name": recipe.name, "sha256": recipe.sha256(), "resolved": resolved}


def is_intact(folder: Path, key: str) -> bool:
    """Whether ``folder`` holds the artefact ``key`` with all its files at full size."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        files = manifest["files"].items()
        sizes_match = all((folder / name).stat().st_size == size for name, size in files)
        return bool(manifest["key"] == key and files and sizes_match)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
