"""MPT: ALiBi instead of positions, LayerNorm without bias."""

from typing import Any

from engine.models.config import Config, layer_spec, model_spec, refuse, tied, whole
from engine.models.spec import LayerNames, Matrix, MlpNames, ModelSpec, NormSpec


def spec(config: Config) -> ModelSpec:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where the config makes no sense."""
    attention = dict(config.get("attn_config") or {})
    refuse(config, no_bias=True, logit_scale=None)
    refuse(attention, alibi=True, attn_type="multihead_attention", qk_ln=False)
    refuse(attention, prefix_lm=False, attn_uses_sequence_id=False)
    hidden, count = whole(config, "d_model"), whole(config, "n_layers")
    clip, scale = attention.get("clip_qkv"), attention.get("softmax_scale")
    layer = layer_spec(
        {"hidden_size": hidden, "num_attention_heads": config["n_heads"]},
        norm=NormSpec(kind="layer", eps=float(config.get("layer_norm_epsilon", 1e-5))),
        mlp_size=whole(config, "expansion_ratio", 4) * hidden,
        activation="gelu",
        gated=False,
        alibi=float(attention.get("alibi_bias_max", 8)),
        qkv_clip=float(clip) if clip else None,
        scale=None if scale is None else float(scale),
    )
    ends: dict[str, Any] = {
        "embedding": "transformer.wte",
        "final_norm": "transformer.norm_f",
        "tied_head": tied(config, default=True),
        "context_length": whole(config, "max_seq_len"),
    }
    return model_spec(config, [layer] * count, [_names(i) for i in range(count)], (), **ends)


def _names(index: int) -> LayerNames:
    layer = f"transformer.blocks.{index}"
    return LayerNames(
        qkv=Matrix(modules=(f"{layer}.attn.Wqkv",)),
        o=Matrix(modules=(f"{layer}.attn.out_proj",)),
        mlps=(
            MlpNames(
                up=Matrix(modules=(f"{layer}.ffn.up_proj",)),
                down=Matrix(modules=(f"{layer}.ffn.down_proj",)),
            ),
        ),
        attention_norm=f"{layer}.norm_1",
        mlp_norm=f"{layer}.norm_2",
    )
