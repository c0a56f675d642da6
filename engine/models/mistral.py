"""Mistral: Llama with one sliding window in all layers."""

from engine.models.config import (
    Config,
    layer_names,
    layer_spec,
    model_spec,
    refuse,
    sliding_window,
    whole,
)
from engine.models.rope import rope_spec
from engine.models.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where the config makes no sense."""
    refuse(config, layer_types=None)
    count = whole(config, "num_hidden_layers")
    layer = layer_spec(config, rope=0, window=sliding_window(config))
    names = [layer_names(i) for i in range(count)]
    return model_spec(config, [layer] * count, names, (rope_spec(config, layer.head_dim),))
