"""GPT-NeoX and Pythia: LayerNorm, biases, parallel residuals, part of each head turned."""

from typing import Any

from engine.models.config import Config, layer_spec, model_spec, whole
from engine.models.rope import rope_spec
from engine.models.spec import LayerNames, Matrix, MlpNames, ModelSpec, NormSpec


def spec(config: Config) -> ModelSpec:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where the config makes no sense."""
    heads, count = whole(config, "num_attention_heads"), whole(config, "num_hidden_layers")
    layer = layer_spec(
        {**config, "num_key_value_heads": heads, "head_dim": None},
        norm=NormSpec(kind="layer", eps=float(config["layer_norm_eps"]), bias=True),
        gated=False,
        rope=0,
        parallel=bool(config.get("use_parallel_residual", True)),
    )
    share = float(config.get("rotary_pct", 0.25))
    theta = float(config.get("rotary_emb_base", 10000.0))
    rope = rope_spec(config, layer.head_dim, theta=theta, share=share)
    bias = bool(config.get("attention_bias", True))
    names = [_names(i, heads, bias) for i in range(count)]
    ends: dict[str, Any] = {
        "embedding": "gpt_neox.embed_in",
        "final_norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
    }
    return model_spec(config, [layer] * count, names, (rope,), **ends)


def _names(index: int, heads: int, bias: bool) -> LayerNames:
    layer = f"gpt_neox.layers.{index}"
    return LayerNames(
        qkv=Matrix(modules=(f"{layer}.attention.query_key_value",), bias=bias, interleaved=heads),
        o=Matrix(modules=(f"{layer}.attention.dense",), bias=bias),
        mlps=(
            MlpNames(
                up=Matrix(modules=(f"{layer}.mlp.dense_h_to_4h",), bias=True),
                down=Matrix(modules=(f"{layer}.mlp.dense_4h_to_h",), bias=True),
            ),
        ),
        attention_norm=f"{layer}.input_layernorm",
        mlp_norm=f"{layer}.post_attention_layernorm",
    )
