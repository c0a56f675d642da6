"""What a job will do to each tensor, found from names, shapes and the config alone.

Everything that can be refused is refused here, before a tensor is read.
"""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

from compress.errors import CompressError
from compress.recipe import Modifier, Recipe
from compress.targets import HEAD, select
from engine.formats.checkpoint import Checkpoint, TensorInfo
from engine.formats.int_quantized import FORMAT, config_group
from engine.models import model_spec
from engine.models.spec import ModelSpec

# The release of compressed-tensors whose layout and configuration are written.
_LAYOUT_VERSION = "0.18.0"
_DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class Plan:
    """``modifiers`` by the name of the linear layer; ``kept`` linears stay as they are.

    ``transposed`` layers store their weight as [K, N]. ``head_weight`` is the module whose
    weight the head uses. ``order`` is the order in which tensors are read and written: layer
    by layer.
    """

    modifiers: dict[str, Modifier]
    kept: list[str]
    transposed: frozenset[str]
    head: str
    head_weight: str
    order: list[str]
    out_bytes: int
    quantization_config: dict[str, object]


def make_plan(recipe: Recipe, checkpoint: Checkpoint) -> Plan:
    """Raises ``CompressError`` or ``ModelLoadError`` where recipe and checkpoint do not fit."""
    spec = _checked_spec(checkpoint)
    matrices = spec.linears()
    linears = sorted(matrices, key=_natural)
    routers = [names.router for names in spec.names if names.router is not None]
    weights = {name: checkpoint.info(f"{name}.weight") for name in [*linears, *routers]}
    modifiers: dict[str, Modifier] = {}
    ignored: list[str] = []
    for modifier in recipe.modifiers:
        never = (HEAD, *routers)
        selected, left_out = select(linears, modifier.targets, modifier.ignore, never)
        if twice := [name for name in selected if name in modifiers]:
            raise CompressError(f"two modifiers target {twice[0]}: one layer, one scheme")
        modifiers |= dict.fromkeys(selected, modifier)
        ignored += left_out
    for name in modifiers:
        _check_weight(name, weights[name])
    kept = [name for name in linears if name not in modifiers]
    transposed = frozenset(name for name in modifiers if matrices[name].transposed)
    # A class as target: it covers all but what is ignored. Conv1D is no Linear.
    whole = set(kept) <= set(ignored) and not transposed
    return Plan(
        modifiers=modifiers,
        kept=[*kept, *routers],
        transposed=transposed,
        head=spec.head,
        head_weight=spec.embedding if spec.tied_head else spec.head,
        order=sorted(checkpoint.tensors, key=_natural),
        out_bytes=sum(
            _out_bytes(info, name.removesuffix(".weight"), modifiers, transposed)
            for name, info in checkpoint.tensors.items()
        ),
        quantization_config=_quantization_config(
            targets=["Linear"] if whole else list(modifiers), ignore=[spec.head, *kept, *routers]
        ),
    )


def _checked_spec(checkpoint: Checkpoint) -> ModelSpec:
    path, config = checkpoint.folder / "config.json", checkpoint.config
    if "quantization_config" in config or "compression_config" in config:
        raise CompressError(
            f"{path} has a quantization_config: the model is compressed already; "
            "name the folder of the original"
        )
    spec = model_spec(checkpoint.folder, config, checkpoint.tensors)
    stem = _DIGITS.split(next(iter(spec.linears())))[0]
    numbered = re.compile(re.escape(stem) + r"(\d+)\.")
    found = {int(match[1]) for name in checkpoint.tensors if (match := numbered.match(name))}
    if found != set(range(len(spec.layers))):
        raise CompressError(
            f"{path} asks for {len(spec.layers)} layers, the weights have {len(found)}: "
            "they do not belong together"
        )
    return spec


def _check_weight(name: str, info: TensorInfo) -> None:
    if info.dtype not in _DTYPE_BYTES or 0 in info.shape:
        raise CompressError(
            f"{name}.weight is {info.dtype} {list(info.shape)}: "
            f"only {', '.join(_DTYPE_BYTES)} weights can be compressed"
        )


def _out_bytes(
    info: TensorInfo, module: str, modifiers: Collection[str], transposed: Collection[str]
) -> int:
    if module not in modifiers:
        return info.nbytes
    rows = info.shape[1 if module in transposed else 0]
    return math.prod(info.shape) + rows * _DTYPE_BYTES[info.dtype]


def _quantization_config(*, targets: list[str], ignore: list[str]) -> dict[str, object]:
    return {
        "version": _LAYOUT_VERSION,
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": config_group(targets)},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _natural(name: str) -> list[str | int]:
    # Of a split, every second part is what the pattern matched.
    return [int(part) if i % 2 else part for i, part in enumerate(_DIGITS.split(name))]
