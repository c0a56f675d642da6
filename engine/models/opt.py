"""OPT: learned positions that begin at row 2, LayerNorm before or after the sum, biases."""

from typing import Any

from engine.models.config import Config, activation, layer_spec, model_spec, refuse, tied, whole
from engine.models.spec import LayerNames, Matrix, MlpNames, ModelSpec, NormSpec


def spec(config: Config) -> ModelSpec:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where the config makes no sense."""
    hidden, count = whole(config, "hidden_size"), whole(config, "num_hidden_layers")
    refuse(config, word_embed_proj_dim=hidden, layer_norm_elementwise_affine=True)
    layer = layer_spec(
        {"hidden_size": hidden, "num_attention_heads": config["num_attention_heads"]},
        norm=NormSpec(kind="layer", eps=1e-5, bias=True),
        mlp_size=whole(config, "ffn_dim"),
        activation=activation(config["activation_function"]),
        gated=False,
    )
    before = bool(config.get("do_layer_norm_before", True))
    final = before and not config.get("_remove_final_layer_norm")
    ends: dict[str, Any] = {
        "embedding": "model.decoder.embed_tokens",
        "positions": "model.decoder.embed_positions",
        "position_offset": 2,
        "final_norm": "model.decoder.final_layer_norm" if final else None,
        "tied_head": tied(config, default=True),
        "optional_prefix": "model.",
    }
    bias = bool(config.get("enable_bias", True))
    names = [_names(i, before, bias) for i in range(count)]
    return model_spec(config, [layer] * count, names, (), **ends)


def _names(index: int, before: bool, bias: bool) -> LayerNames:
    layer = f"model.decoder.layers.{index}"
    norms = ("attention_norm", "mlp_norm") if before else ("attention_sum_norm", "mlp_sum_norm")

    def matrix(*names: str) -> Matrix:
        return Matrix(modules=tuple(f"{layer}.{name}" for name in names), bias=bias)

    return LayerNames(
        qkv=matrix("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        o=matrix("self_attn.out_proj"),
        mlps=(MlpNames(up=matrix("fc1"), down=matrix("fc2")),),
        **{norms[0]: f"{layer}.self_attn_layer_norm", norms[1]: f"{layer}.final_layer_norm"},
    )
