"""GPT-2: learned positions, LayerNorm, biases, and weights stored as [K, N] (Conv1D)."""

from dataclasses import replace
from typing import Any

from engine.models.config import Config, activation, layer_spec, model_spec, refuse, tied, whole
from engine.models.spec import LayerNames, Matrix, MlpNames, ModelSpec, NormSpec


def spec(config: Config) -> ModelSpec:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where the config makes no sense."""
    refuse(config, add_cross_attention=False)
    hidden, count = whole(config, "n_embd"), whole(config, "n_layer")
    layer = layer_spec(
        {"hidden_size": hidden, "num_attention_heads": config["n_head"]},
        norm=NormSpec(kind="layer", eps=float(config["layer_norm_epsilon"]), bias=True),
        mlp_size=whole(config, "n_inner", 4 * hidden),
        activation=activation(config["activation_function"]),
        gated=False,
    )
    scale = layer.head_dim**-0.5 if config.get("scale_attn_weights", True) else 1.0
    inverse = bool(config.get("scale_attn_by_inverse_layer_idx"))
    layers = [replace(layer, scale=scale / (i + 1 if inverse else 1)) for i in range(count)]
    ends: dict[str, Any] = {
        "embedding": "transformer.wte",
        "positions": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "tied_head": tied(config, default=True),
        "context_length": whole(config, "n_positions"),
        "optional_prefix": "transformer.",
    }
    return model_spec(config, layers, [_names(i) for i in range(count)], (), **ends)


def _names(index: int) -> LayerNames:
    layer = f"transformer.h.{index}"

    def conv1d(name: str) -> Matrix:
        return Matrix(modules=(f"{layer}.{name}",), bias=True, transposed=True)

    return LayerNames(
        qkv=conv1d("attn.c_attn"),
        o=conv1d("attn.c_proj"),
        mlps=(MlpNames(up=conv1d("mlp.c_fc"), down=conv1d("mlp.c_proj")),),
        attention_norm=f"{layer}.ln_1",
        mlp_norm=f"{layer}.ln_2",
    )
