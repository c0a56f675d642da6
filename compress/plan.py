"""What a job will do to each tensor, found from names, shapes and the config alone.

Everything that can be refused is refused here, before a tensor is read.
"""

import re
from dataclasses import dataclass

from compress.errors import CompressError
from compress.recipe import Modifier, Recipe
from compress.targets import HEAD, select
from engine.formats.checkpoint import Checkpoint, TensorInfo
from engine.formats.int_quantized import FORMAT, config_group

# The release of compressed-tensors whose layout and configuration are written.
_LAYOUT_VERSION = "0.18.0"
_LINEAR = re.compile(r"(model\.layers\.(\d+)\..+)\.weight")
_DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class Plan:
    """``modifiers`` by the name of the linear layer; ``kept`` linears stay as they are.

    ``order`` is the order in which tensors are read and written: layer by layer.
    """

    modifiers: dict[str, Modifier]
    kept: list[str]
    order: list[str]
    out_bytes: int
    quantization_config: dict[str, object]


def make_plan(recipe: Recipe, checkpoint: Checkpoint) -> Plan:
    """Raises ``CompressError`` where the recipe does not fit the checkpoint."""
    _check_config(checkpoint)
    linears = _linear_names(checkpoint)
    modifiers: dict[str, Modifier] = {}
    ignored: list[str] = []
    for modifier in recipe.modifiers:
        selected, left_out = select(linears, modifier.targets, modifier.ignore)
        if twice := [name for name in selected if name in modifiers]:
            raise CompressError(f"two modifiers target {twice[0]}: one layer, one scheme")
        modifiers |= dict.fromkeys(selected, modifier)
        ignored += left_out
    for name in modifiers:
        _check_weight(name, checkpoint.info(f"{name}.weight"))
    kept = [name for name in linears if name not in modifiers]
    return Plan(
        modifiers=modifiers,
        kept=kept,
        order=sorted(checkpoint.tensors, key=_natural),
        out_bytes=sum(_out_bytes(name, i, modifiers) for name, i in checkpoint.tensors.items()),
        quantization_config=_quantization_config(list(modifiers), kept, set(kept) <= set(ignored)),
    )


def _check_config(checkpoint: Checkpoint) -> None:
    path, config = checkpoint.folder / "config.json", checkpoint.config
    if "quantization_config" in config or "compression_config" in config:
        raise CompressError(
            f"{path} has a quantization_config: the model is compressed already; "
            "name the folder of the original"
        )
    found = {int(m[2]) for name in checkpoint.tensors if (m := _LINEAR.fullmatch(name))}
    if not found:
        raise CompressError(
            f"{checkpoint.folder} has no model.layers.N.*.weight tensors: "
            "only models with Llama's layer names can be compressed"
        )
    layers = config.get("num_hidden_layers")
    if layers is not None and (not isinstance(layers, int) or found != set(range(layers))):
        raise CompressError(
            f"{path} asks for {layers} layers, the weights have {len(found)}: "
            "they do not belong together"
        )


def _linear_names(checkpoint: Checkpoint) -> list[str]:
    names = [
        match[1]
        for name, info in checkpoint.tensors.items()
        if (match := _LINEAR.fullmatch(name)) and len(info.shape) == 2
    ]
    return sorted(names, key=_natural)


def _check_weight(name: str, info: TensorInfo) -> None:
    if info.dtype not in _DTYPE_BYTES or 0 in info.shape:
        raise CompressError(
            f"{name}.weight is {info.dtype} {list(info.shape)}: "
            f"only {', '.join(_DTYPE_BYTES)} weights can be compressed"
        )


def _out_bytes(name: str, info: TensorInfo, modifiers: dict[str, Modifier]) -> int:
    if name.removesuffix(".weight") not in modifiers or not name.endswith(".weight"):
        return info.nbytes
    return info.shape[0] * (info.shape[1] + _DTYPE_BYTES[info.dtype])


def _quantization_config(
    linears: list[str], kept: list[str], others_ignored: bool
) -> dict[str, object]:
    targets = ["Linear"] if others_ignored else linears
    return {
        "version": _LAYOUT_VERSION,
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": config_group(targets)},
        "ignore": [HEAD, *kept],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _natural(name: str) -> list[str | int]:
    # Of a split, every second part is what the pattern matched.
    return [int(part) if i % 2 else part for i, part in enumerate(_DIGITS.split(name))]
