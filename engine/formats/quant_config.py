"""Reads ``quantization_config`` of config.json: is it something that the engine executes?

Sources: compressed-tensors' configuration, versions 0.10 to 0.20; for GPTQ and AWQ see their
formats.
"""

from typing import Any

from engine.errors import ModelLoadError
from engine.formats import REMEDY, awq, float_quantized, gptq, int_quantized, pack_quantized

_INT8_WEIGHTS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
_INT4_WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True}
_INT8_ACTIVATIONS = {"num_bits": 8, "type": "int", "strategy": "token"}
_INT8_ACTIVATIONS |= {"dynamic": True, "symmetric": True}
_FLOAT8_WEIGHTS = {**_INT8_WEIGHTS, "type": "float"}
_FLOAT8_ACTIVATIONS = {**_INT8_ACTIVATIONS, "type": "float"}
_PACKED_BITS = (4, 8)
_PACKED_STRATEGIES = ("group", "channel")
MIXED = "mixed-precision"
_SERVED = (int_quantized.FORMAT, pack_quantized.FORMAT, float_quantized.FORMAT, MIXED)


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
        raise ModelLoadError(
            f"quant_method {method!r} is not served, compressed-tensors, gptq and awq are: {REMEDY}"
        )
    kind = quantization.get("format")
    if kind not in _SERVED:
        raise ModelLoadError(
            f"compressed-tensors format {kind!r} is not served, {', '.join(_SERVED)} are: {REMEDY}"
        )
    if quantization.get("kv_cache_scheme"):
        raise ModelLoadError(f"a kv_cache_scheme (static scales) is not served: {REMEDY}")
    if quantization.get("transform_config"):
        raise ModelLoadError(f"a transform_config (rotations) is not served: {REMEDY}")
    sparsity = quantization.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise ModelLoadError(f"compressed-tensors with sparse weights is not served: {REMEDY}")
    groups = quantization.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise ModelLoadError("quantization_config.config_groups must hold JSON objects")
    for name, group in groups.items():
        if group.get("output_activations"):
            raise ModelLoadError(f"quantization_config {name} quantises outputs: {REMEDY}")
        own = group.get("format") or kind
        if kind not in (MIXED, own):
            raise ModelLoadError(
                f"quantization_config.format is {kind!r}, that of {name} is {own!r}: {REMEDY}"
            )
        _check_group(name, group, own)
    return f"compressed-tensors/{kind}"


def packed_scheme(config: dict[str, Any]) -> gptq.GptqScheme | awq.AwqScheme | None:
    """Of a checkpoint that GPTQ or AWQ packed, None for any other. Raises ``ModelLoadError``."""
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        match quantization.get("quant_method"):
            case gptq.METHOD:
                return gptq.read_scheme(quantization)
            case awq.METHOD:
                return awq.read_scheme(quantization)
    return None


def _check_group(name: str, group: dict[str, Any], kind: str) -> None:
    weights = group.get("weights")
    if kind == int_quantized.FORMAT:
        by_group = isinstance(weights, dict) and weights.get("num_bits") == 4
        _check(name, "weights", weights, _INT4_WEIGHTS if by_group else _INT8_WEIGHTS)
        _check(name, "input_activations", group.get("input_activations"), _INT8_ACTIVATIONS)
        return
    if kind == float_quantized.FORMAT:
        _check(name, "weights", weights, _FLOAT8_WEIGHTS)
        _check(name, "input_activations", group.get("input_activations"), _FLOAT8_ACTIVATIONS)
        return
    if kind != pack_quantized.FORMAT:
        raise ModelLoadError(f"quantization_config {name}.format {kind!r} is not served: {REMEDY}")
    if group.get("input_activations"):
        raise ModelLoadError(
            f"quantization_config {name}: packed weights with input_activations are not served: "
            f"{REMEDY}"
        )
    if isinstance(weights, dict) and weights.get("actorder") == "group":
        raise ModelLoadError(
            f"quantization_config {name}: actorder 'group' (weight_g_idx) is not served; "
            f"'static' is: {REMEDY}"
        )
    served = {"type": "int", "num_bits": _PACKED_BITS, "strategy": _PACKED_STRATEGIES}
    _check(name, "weights", weights, served)


def _check(group: str, part: str, found: Any, served: dict[str, Any]) -> None:
    """``served`` has the value of each key, or a tuple of those that are possible."""
    found = found or {}
    if not isinstance(found, dict):
        raise ModelLoadError(f"quantization_config {group}.{part} must be a JSON object")
    for key, value in served.items():
        values = value if isinstance(value, tuple) else (value,)
        if found.get(key) not in values:
            raise ModelLoadError(
                f"quantization_config {group}.{part}.{key} is {found.get(key)!r}, "
                f"served is {' or '.join(map(repr, values))}: {REMEDY}"
            )
