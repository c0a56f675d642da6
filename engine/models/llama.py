"""Llama 2 and 3: the names and keys that most other families took over."""

from engine.models.config import Config, layer_names, layer_spec, model_spec, whole
from engine.models.rope import rope_spec
from engine.models.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where the config makes no sense."""
    layer, count = layer_spec(config, rope=0), whole(config, "num_hidden_layers")
    attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    names = [
        layer_names(i, qkv_bias=attention_bias, o_bias=attention_bias, mlp_bias=mlp_bias)
        for i in range(count)
    ]
    return model_spec(config, [layer] * count, names, (rope_spec(config, layer.head_dim),))
