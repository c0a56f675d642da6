"""What a job will do to each tensor, found from names, shapes and the config alone.

Everything that can be refused is refused here, before a tensor is read.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from compress.errors import CompressError
from compress.methods import METHODS
from compress.recipe import Modifier, Recipe
from compress.targets import HEAD, select
from compress.treatment import Treatment, combine
from engine.formats import float_quantized, int_quantized, pack_quantized
from engine.formats.checkpoint import Checkpoint, TensorInfo
from engine.formats.quant_config import MIXED
from engine.models import model_spec
from engine.models.spec import ModelSpec

# The release of compressed-tensors whose layout and configuration are written.
_LAYOUT_VERSION = "0.18.0"
_DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class Plan:
    """``treatments`` by the name of the linear layer; ``kept`` linears stay as they are.

    ``transposed`` layers store their weight as [K, N]. ``head_weight`` is the module whose
    weight the head uses. ``order`` is the order in which tensors are read and written: layer
    by layer.
    """

    spec: ModelSpec
    treatments: dict[str, Treatment]
    kept: list[str]
    transposed: frozenset[str]
    head: str
    head_weight: str
    order: list[str]
    out_bytes: int
    quantization_config: dict[str, object] | None

    @property
    def calibrated(self) -> bool:
        """Whether any step needs the layers' inputs."""
        return any(
            METHODS[modifier.type].calibrated
            for treatment in self.treatments.values()
            for modifier in treatment.modifiers
        )


def make_plan(recipe: Recipe, checkpoint: Checkpoint) -> Plan:
    """Raises ``CompressError`` or ``ModelLoadError`` where recipe and checkpoint do not fit."""
    spec = _checked_spec(checkpoint)
    matrices = spec.linears()
    linears = sorted(matrices, key=_natural)
    routers = [names.router for names in spec.names if names.router is not None]
    weights = {name: checkpoint.info(f"{name}.weight") for name in [*linears, *routers]}
    selected: dict[str, list[Modifier]] = {}
    ignored: list[str] = []
    for modifier in recipe.modifiers:
        never = (HEAD, *routers)
        names, left_out = select(linears, modifier.targets, modifier.ignore, never)
        for name in names:
            selected.setdefault(name, []).append(modifier)
        ignored += left_out
    transposed = frozenset(name for name in selected if matrices[name].transposed)
    level = {
        m: i for i, names in enumerate(spec.names) for x in names.matrices() for m in x.modules
    }
    treatments: dict[str, Treatment] = {}
    for name in linears:
        if name in selected:
            _check_weight(name, weights[name])
            shape = weights[name].shape
            columns = shape[0 if name in transposed else 1]
            where = (level[name], len(spec.names))
            treatments[name] = combine(name, selected[name], columns, where)
    rounded = [name for name, one in treatments.items() if one.format is not None]
    kept = [name for name in linears if name not in treatments]
    dense = [name for name in linears if name not in rounded]
    # A class as target: it covers all but what is ignored. Conv1D is no Linear.
    whole = set(dense) <= set(ignored) and not transposed
    return Plan(
        spec=spec,
        treatments=treatments,
        kept=[*kept, *routers],
        transposed=transposed,
        head=spec.head,
        head_weight=spec.embedding if spec.tied_head else spec.head,
        order=sorted(checkpoint.tensors, key=_natural),
        out_bytes=sum(
            _out_bytes(info, treatments.get(name.removesuffix(".weight")))
            for name, info in checkpoint.tensors.items()
        ),
        quantization_config=_quantization_config(
            treatments, whole=whole, ignore=[spec.head, *dense, *routers]
        ),
    )


def _checked_spec(checkpoint: Checkpoint) -> ModelSpec:
    path, config = checkpoint.folder / "config.json", checkpoint.config
    if "quantization_config" in config or "compression_config" in config:
        raise CompressError(
            f"{checkpoint.folder} has a quantization_config: the model is compressed already; "
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


def _out_bytes(info: TensorInfo, treatment: Treatment | None) -> int:
    if treatment is None or treatment.bits is None:
        return info.nbytes
    weights = math.prod(info.shape)
    groups = max(info.shape) if treatment.group_size is None else weights // treatment.group_size
    # Scales, zero points and the last word of a row.
    return weights * treatment.bits // 8 + groups * (_DTYPE_BYTES[info.dtype] + 1) + 4096


def _quantization_config(
    treatments: dict[str, Treatment], *, whole: bool, ignore: Sequence[str]
) -> dict[str, object] | None:
    groups: dict[str, tuple[Treatment, list[str]]] = {}
    for name, one in treatments.items():
        if one.format is not None:
            groups.setdefault(repr(one.scheme_key), (one, []))[1].append(name)
    if not groups:
        return None
    formats = {one.format for one, _ in groups.values()}
    whole = whole and len(groups) == 1
    return {
        "version": _LAYOUT_VERSION,
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": _config_group(one, ["Linear"] if whole else names)
            for i, (one, names) in enumerate(groups.values())
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _config_group(treatment: Treatment, targets: list[str]) -> dict[str, object]:
    if treatment.format == int_quantized.FORMAT:
        return int_quantized.config_group(targets)
    if treatment.format == float_quantized.FORMAT:
        return float_quantized.config_group(targets)
    assert treatment.bits is not None
    return pack_quantized.config_group(
        targets, treatment.bits, treatment.group_size, symmetric=treatment.symmetric
    )


def _natural(name: str) -> list[str | int]:
    # Of a split, every second part is what the pattern matched.
    return [int(part) if i % 2 else part for i, part in enumerate(_DIGITS.split(name))]
