"""What is to be done to a model: a frozen ``Recipe``, read from YAML or by a preset's name.

A preset is a recipe file in ``presets``. What is planned but not available in this version is
refused by name rather than ignored.
"""

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from compress.auto.config import Auto, Frontier
from compress.errors import CompressError
from compress.gate.config import Gate
from compress.recipe_nodes import suggest

PRESETS = Path(__file__).with_name("presets")
# Weights' bits and what multiplies them: int8 activations, float ones, or FP8 ones.
SCHEMES = {
    "w8a8": (8, "int8"),
    "w8a16": (8, "float"),
    "w4a16": (4, "float"),
    "w4a8": (4, "int8"),
    "fp8": (8, "float8"),
}
# What the kernels multiply: whole vectors of weights, with int8 activations four at most.
GROUP_UNIT = 32
LONGEST_INT8_GROUP = 128
# Only a reference computes these here.
SLOW_SCHEMES = ("fp8",)
_ROUNDING = ("scheme", "group_size", "symmetric", "scale")
_PRUNING = ("sparsity", "structure", "allocation")
OPTIONS: dict[str, tuple[str, ...]] = {
    "rtn": _ROUNDING,
    "gptq": (*_ROUNDING, "actorder"),
    "awq": (*_ROUNDING, "clip"),
    "smoothquant": ("alpha",),
    "magnitude": _PRUNING,
    "wanda": _PRUNING,
    "sparsegpt": _PRUNING,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Modifier:
    """One step: method ``type`` on the linear layers that match.

    Options of other types are None. ``sparsity`` is a share of the weights, or one for each
    decoder layer. ``allocation`` None: all layers have the same sparsity, or that of the list.
    """

    type: str
    scheme: str | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    scale: Literal["absmax", "mse"] | None = None
    actorder: Literal["static", "none"] | None = None
    clip: bool | None = None
    alpha: float | None = None
    sparsity: float | tuple[float, ...] | None = None
    structure: str | None = None
    allocation: Literal["owl"] | None = None
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ("lm_head",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Text whose activations methods see: the model's own, or that of ``paths``.

    ``samples`` windows of ``length`` tokens.
    """

    source: Literal["generate", "file"] = "generate"
    paths: tuple[str, ...] = ()
    samples: int = 128
    length: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCache:
    """What the engine keeps keys and values in."""

    dtype: Literal["int8", "fp32"] = "int8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A resolved recipe. ``name`` is the preset's or the file's and changes nothing.

    ``head`` int8 is quantised when the engine loads the artefact, which keeps the original
    dtype. ``calibration`` is None where no modifier needs any. ``auto`` chose the modifiers on
    ``frontier``; until it has, there are none.
    """

    name: str = field(compare=False)
    version: int
    seed: int
    head: Literal["int8", "keep"]
    modifiers: tuple[Modifier, ...]
    kv_cache: KvCache
    calibration: Calibration | None = None
    gate: Gate
    auto: Auto | None = None
    frontier: Frontier | None = None

    def canonical_json(self) -> str:
        """The same text for the same artefact: keys sorted; without the name and the gate."""
        fields = asdict(self)
        del fields["name"], fields["gate"]
        if self.calibration is not None:  # what the files hold is part of the key, not their names
            del fields["calibration"]["paths"]
        if self.auto is None:
            del fields["auto"], fields["frontier"]
        fields["modifiers"] = [
            {key: value for key, value in modifier.items() if value is not None}
            for modifier in fields["modifiers"]
        ]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @property
    def activations(self) -> Literal["int8", "float"]:
        """What multiplies packed weights; all schemes of a recipe agree on it."""
        found = {SCHEMES[m.scheme][1] for m in self.modifiers if m.scheme is not None}
        if self.auto is not None:
            return "int8"
        return "int8" if "int8" in found and "float" not in found else "float"

    @property
    def slow_schemes(self) -> list[str]:
        """Those that this machine can only evaluate."""
        return sorted({m.scheme for m in self.modifiers if m.scheme in SLOW_SCHEMES})

    def sha256(self) -> str:
        """Hex digest of ``canonical_json``."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()


def presets() -> list[str]:
    """Names that ``resolve`` knows: one for each file in the presets folder."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def resolve(spec: str) -> Recipe:
    """The recipe of a preset's name or of a path to a YAML file.

    Raises:
        CompressError: no such preset or file, or the file is not a valid recipe.
    """
    if spec in presets():
        return load(PRESETS / f"{spec}.yaml")
    path = Path(spec)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return load(path)
    raise CompressError(
        f"there is no recipe {spec!r}; {suggest(spec, presets())} (or the path of a YAML file)"
    )


def load(path: Path) -> Recipe:
    """Reads a recipe file. Raises ``CompressError`` that names the file and the line."""
    from compress.recipe_reader import read

    return read(path)


def not_yet(what: str, available: Collection[str]) -> str:
    """A refusal of what is planned."""
    return f"{what} is not available yet; available: {', '.join(available)}"
