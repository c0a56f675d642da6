"""Reads ``quantization_config`` of config.json: is it something that the engine executes?

Source: compressed-tensors' configuration, versions 0.10 to 0.20.
"""

from collections.abc import Mapping
from typing import Any

from engine.errors import ModelLoadError
from engine.formats import int_quantized, pack_quantized, sparse

_INT8_WEIGHTS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
_INT8_ACTIVATIONS = {"num_bits": 8, "type": "int", "strategy": "token"}
_INT8_ACTIVATIONS |= {"dynamic": True, "symmetric": True}
_PACKED_WEIGHTS = {"num_bits": 4, "type": "int"}
MIXED = "mixed-precision"
_SERVED = (int_quantized.FORMAT, pack_quantized.FORMAT, *sparse.FORMATS, MIXED)


def checkpoint_format(config: dict[str, Any]) -> str:
    """``safetensors``, or ``compressed-tensors/<format>``. Raises ``ModelLoadError``.

    The checkpoint is refused by name where the engine has no arithmetic for what it asks.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return "safetensors"
    if not isinstance(quantization, dict):
        raise ModelLoadError("quantization_config must be a JSON object")
    method = quantization.get("quant_method")
    if method != "compressed-tensors":
        raise ModelLoadError(f"quant_method {method!r} is not served; compressed-tensors is")
    kind = quantization.get("format")
    if kind not in _SERVED:
        raise ModelLoadError(
            f"compressed-tensors format {kind!r} is not served; served: {', '.join(_SERVED)}"
        )
    if quantization.get("kv_cache_scheme"):
        raise ModelLoadError("a checkpoint with a kv_cache_scheme (static scales) is not served")
    if quantization.get("transform_config"):
        raise ModelLoadError("a checkpoint with a transform_config (rotations) is not served")
    groups = quantization.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise ModelLoadError("quantization_config.config_groups must hold JSON objects")
    for name, group in groups.items():
        if group.get("output_activations"):
            raise ModelLoadError(f"quantization_config {name} quantises outputs: not served")
        _check_group(name, group, group.get("format") or kind)
    return f"compressed-tensors/{kind}"


def overall_format(groups: Mapping[str, Mapping[str, object]]) -> str:
    """``format`` of a ``quantization_config`` with these config_groups."""
    formats = {str(group["format"]) for group in groups.values()}
    return formats.pop() if len(formats) == 1 else MIXED


def _check_group(name: str, group: dict[str, Any], kind: str) -> None:
    weights = group.get("weights")
    if kind in sparse.FORMATS:
        if group.get("sparsity") not in sparse.STRUCTURES:
            raise ModelLoadError(f"quantization_config {name}.sparsity is not served")
        kind = sparse.FORMATS[kind]
    if kind == int_quantized.FORMAT:
        _check(name, "weights", weights, _INT8_WEIGHTS)
        _check(name, "input_activations", group.get("input_activations"), _INT8_ACTIVATIONS)
        return
    if kind != pack_quantized.FORMAT:
        raise ModelLoadError(f"quantization_config {name}.format {kind!r} is not served")
    if group.get("input_activations"):
        raise ModelLoadError(f"quantization_config {name}: packed weights with activations")
    if isinstance(weights, dict) and weights.get("actorder") == "group":
        raise ModelLoadError(
            f"quantization_config {name}: actorder 'group' (weight_g_idx) is not served; "
            "'static' is"
        )
    bits = weights.get("num_bits") if isinstance(weights, dict) else None
    _check(name, "weights", weights, _INT8_WEIGHTS if bits == 8 else _PACKED_WEIGHTS)


def _check(group: str, part: str, found: Any, served: dict[str, Any]) -> None:
    found = found or {}
    if not isinstance(found, dict):
        raise ModelLoadError(f"quantization_config {group}.{part} must be a JSON object")
    for key, value in served.items():
        if found.get(key) != value:
            raise ModelLoadError(
                f"quantization_config {group}.{part}.{key} is {found.get(key)!r}, "
                f"served is {value!r}"
            )
