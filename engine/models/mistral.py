"""Mistral: Llama with one sliding window in all layers."""

from engine.models.config import Config, layer_names, layer_spec, model_spec, refuse
from engine.models.rope import rope_spec
from engine.models.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where the config makes no sense."""
    refuse(config, layer_types=None)
    window, count = config.get("sliding_window"), int(config["num_hidden_layers"])
    layer = layer_spec(config, rope=0, window=None if window is None else int(window))
    names = [layer_names(i) for i in range(count)]
    return model_spec(config, [layer] * count, names, (rope_spec(config, layer.head_dim),))
