"""Llama: maps its config.json and its weight names onto the decoder."""

from typing import Any

from engine.models.spec import LayerNames, LayerSpec, ModelSpec


def spec(config: dict[str, Any]) -> ModelSpec:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where the config makes no sense."""
    if config.get("hidden_act") != "silu":
        raise ValueError(f"hidden_act must be silu, not {config.get('hidden_act')!r}")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError("biases are not supported")
    heads = int(config["num_attention_heads"])
    layer = LayerSpec(
        hidden_size=int(config["hidden_size"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
        mlp_size=int(config["intermediate_size"]),
        norm_eps=float(config["rms_norm_eps"]),
    )
    return ModelSpec(
        architecture="LlamaForCausalLM",
        layer=layer,
        names=tuple(_names(i) for i in range(int(config["num_hidden_layers"]))),
        embedding="model.embed_tokens",
        final_norm="model.norm",
        head="lm_head",
        tied_head=bool(config.get("tie_word_embeddings", False)),
        vocabulary_size=int(config["vocab_size"]),
        context_length=int(config["max_position_embeddings"]),
        rope_theta=_rope_theta(config),
    )


def _names(index: int) -> LayerNames:
    attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
    return LayerNames(
        q=f"{attention}.q_proj",
        k=f"{attention}.k_proj",
        v=f"{attention}.v_proj",
        o=f"{attention}.o_proj",
        gate=f"{mlp}.gate_proj",
        up=f"{mlp}.up_proj",
        down=f"{mlp}.down_proj",
        attention_norm=f"model.layers.{index}.input_layernorm",
        mlp_norm=f"model.layers.{index}.post_attention_layernorm",
    )


def _rope_theta(config: dict[str, Any]) -> float:
    # transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type {kind!r} is not supported")
    return float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
