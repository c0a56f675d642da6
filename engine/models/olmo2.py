"""OLMo 2: Llama with norms after attention and MLP, and over all heads of q and k."""

from engine.models.config import Config, layer_names, layer_spec, model_spec, whole
from engine.models.rope import rope_spec
from engine.models.spec import ModelSpec

_NORMS = {
    "attention_out_norm": "post_attention_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}


def spec(config: Config) -> ModelSpec:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where the config makes no sense."""
    layer, count = layer_spec(config, rope=0, qk_norm="all"), whole(config, "num_hidden_layers")
    bias = bool(config.get("attention_bias"))
    names = [layer_names(i, _NORMS, qkv_bias=bias, o_bias=bias) for i in range(count)]
    return model_spec(config, [layer] * count, names, (rope_spec(config, layer.head_dim),))
