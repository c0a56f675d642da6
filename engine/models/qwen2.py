"""Qwen2 and 2.5: Llama with biases of q, k and v; some layers may have a sliding window."""

from dataclasses import replace

from engine.models.config import (
    Config,
    layer_names,
    layer_spec,
    model_spec,
    sliding_window,
    whole,
    windows,
)
from engine.models.rope import rope_spec
from engine.models.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where the config makes no sense."""
    layer = layer_spec(config, rope=0)
    layers = [replace(layer, window=window) for window in qwen_windows(config)]
    names = [layer_names(i, qkv_bias=True) for i in range(len(layers))]
    return model_spec(config, layers, names, (rope_spec(config, layer.head_dim),))


def qwen_windows(config: Config) -> list[int | None]:
    """Of the layers from ``max_window_layers`` on, where ``use_sliding_window`` says so."""
    used = bool(config.get("use_sliding_window")) and sliding_window(config) is not None
    first = whole(config, "max_window_layers", 28)
    found = windows(config, lambda i: used and i >= first)
    if not used and any(found):
        raise ValueError("layer_types ask for sliding windows, use_sliding_window does not")
    return found
