"""A compression to be done: the recipe, the sources and the key that names the result."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from compress.errors import CompressError
from compress.methods import METHODS
from compress.progress import Progress
from compress.recipe import Recipe
from compress.sources import HashMemo, Sources, hash_sources

FORMAT_VERSION = 1
# Raised whenever the same model and seed write another text.
_GENERATOR_VERSION = 2


@dataclass(frozen=True, slots=True)
class Job:
    """``key`` is equal exactly where the artefact's weights and files would be."""

    recipe: Recipe
    sources: Sources
    key: str

    @classmethod
    def prepare(cls, recipe: Recipe, model_dir: Path, memo: HashMemo, progress: Progress) -> "Job":
        """Hashes the sources. Raises ``CompressError``."""
        progress.phase("hashing", str(model_dir))
        sources = hash_sources(model_dir, memo)
        parts = {
            "format": FORMAT_VERSION,
            "sources": sources.hashes,
            "recipe": recipe.canonical_json(),
            "calibration": _calibration_hashes(recipe, memo),
            "methods": {m.type: METHODS[m.type].version for m in recipe.modifiers},
        }
        text = json.dumps(parts, sort_keys=True)
        return cls(recipe, sources, hashlib.sha256(text.encode()).hexdigest())


def _calibration_hashes(recipe: Recipe, memo: HashMemo) -> list[str]:
    """Of the user's text, in order, or the generator's version. Raises ``CompressError``."""
    if recipe.calibration is not None and recipe.calibration.source == "generate":
        return [f"generator {_GENERATOR_VERSION}"]
    paths = () if recipe.calibration is None else recipe.calibration.paths
    try:
        return [memo.sha256(Path(path)) for path in paths]
    except OSError as error:
        raise CompressError(f"{error.filename} cannot be read: {error.strerror}") from error
