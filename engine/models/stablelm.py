"""StableLM 2: Llama with LayerNorm and part of each head turned."""

from engine.models.config import (
    LLAMA_NORMS,
    Config,
    layer_names,
    layer_spec,
    model_spec,
    refuse,
    whole,
)
from engine.models.rope import rope_spec
from engine.models.spec import ModelSpec, NormSpec


def spec(config: Config) -> ModelSpec:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where the config makes no sense."""
    refuse(config, qk_layernorm=False)
    parallel, count = bool(config.get("use_parallel_residual")), whole(config, "num_hidden_layers")
    norm = NormSpec(kind="layer", eps=float(config["layer_norm_eps"]), bias=True)
    layer = layer_spec({**config, "head_dim": None}, norm=norm, rope=0, parallel=parallel)
    share = float(config.get("partial_rotary_factor", 0.25))
    # In parallel, attention and MLP also share their norm.
    norms = LLAMA_NORMS | ({"mlp_norm": "input_layernorm"} if parallel else {})
    bias = bool(config.get("use_qkv_bias"))
    names = [layer_names(i, norms, qkv_bias=bias) for i in range(count)]
    ropes = (rope_spec(config, layer.head_dim, share=share),)
    return model_spec(config, [layer] * count, names, ropes)
