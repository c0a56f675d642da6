"""Reads ``quantization_config`` of config.json: is it something that the engine executes?

Source: compressed-tensors' configuration, versions 0.10 to 0.20.
"""

from typing import Any

from engine.errors import ModelLoadError
from engine.formats import int_quantized

_SERVED_WEIGHTS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
_SERVED_ACTIVATIONS = {"num_bits": 8, "type": "int", "strategy": "token"}
_SERVED_ACTIVATIONS |= {"dynamic": True, "symmetric": True}


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
    if kind != int_quantized.FORMAT:
        raise ModelLoadError(
            f"compressed-tensors format {kind!r} is not served; {int_quantized.FORMAT} is"
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
        _check(name, "weights", group.get("weights"), _SERVED_WEIGHTS)
        _check(name, "input_activations", group.get("input_activations"), _SERVED_ACTIVATIONS)
    return f"compressed-tensors/{kind}"


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
