"""Gemma 2 and the text model of Gemma 3: norms before and after, alternating windows."""

from dataclasses import replace
from typing import Any

from engine.models.config import (
    Config,
    activation,
    layer_names,
    layer_spec,
    model_spec,
    refuse,
    tied,
    whole,
    windows,
)
from engine.models.rope import rope_spec
from engine.models.spec import LayerNames, LayerSpec, ModelSpec, NormSpec

_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
_QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}


def gemma2(config: Config) -> ModelSpec:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where the config makes no sense."""
    layer = _layer(config, score_cap=_number(config["attn_logit_softcapping"]))
    sliding = windows(config, lambda i: i % 2 == 0)
    layers = [replace(layer, rope=0, window=window) for window in sliding]
    ropes = (rope_spec(config, layer.head_dim),)
    ends = _ends(config, config["final_logit_softcapping"])
    return model_spec(config, layers, _names(config, _NORMS), ropes, **ends)


def gemma3(config: Config) -> ModelSpec:
    """Layers with a window have a rotary base of their own. Errors as for ``gemma2``."""
    refuse(config, attn_logit_softcapping=None)
    layer = _layer(config, qk_norm="head")
    pattern = whole(config, "_sliding_window_pattern", whole(config, "sliding_window_pattern", 6))
    sliding = windows(config, lambda i: (i + 1) % pattern != 0)
    layers = [replace(layer, rope=int(w is not None), window=w) for w in sliding]
    # Before transformers 5, rope_theta and rope_scaling were those of the full layers.
    local = {**config, "rope_theta": config.get("rope_local_base_freq"), "rope_scaling": None}
    ropes = (
        rope_spec(config, layer.head_dim, theta=1e6, layer_type="full_attention"),
        rope_spec(local, layer.head_dim, theta=1e4, layer_type="sliding_attention"),
    )
    ends = _ends(config, config.get("final_logit_softcapping"))
    return model_spec(config, layers, _names(config, _NORMS | _QK_NORMS), ropes, **ends)


def _layer(config: Config, **values: Any) -> LayerSpec:
    refuse(config, use_bidirectional_attention=False)
    return layer_spec(
        config,
        activation=activation(config["hidden_activation"]),
        norm=NormSpec(eps=float(config["rms_norm_eps"]), offset=1.0),
        scale=float(config["query_pre_attn_scalar"]) ** -0.5,
        **values,
    )


def _names(config: Config, norms: dict[str, str]) -> list[LayerNames]:
    bias = bool(config.get("attention_bias"))
    count = whole(config, "num_hidden_layers")
    return [layer_names(i, norms, qkv_bias=bias, o_bias=bias) for i in range(count)]


def _ends(config: Config, cap: Any) -> dict[str, Any]:
    return {
        "tied_head": tied(config, default=True),
        "embedding_scale": float(config["hidden_size"]) ** 0.5,
        "logit_cap": _number(cap),
    }


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
