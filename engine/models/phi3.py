"""Phi-3 and Phi-4-mini: Llama with q, k, v and gate, up fused in the checkpoint."""

from dataclasses import replace

from engine.models.config import Config, layer_names, layer_spec, model_spec, sliding_window, whole
from engine.models.rope import rope_spec
from engine.models.spec import LayerNames, Matrix, MlpNames, ModelSpec


def spec(config: Config) -> ModelSpec:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where the config makes no sense."""
    config = {"sliding_window": None, "original_max_position_embeddings": 4096} | config
    layer = layer_spec(config, rope=0, window=sliding_window(config))
    share, count = config.get("partial_rotary_factor", 1.0), whole(config, "num_hidden_layers")
    rope = rope_spec(config, layer.head_dim, share=share)
    if rope.kind not in ("default", "longrope"):
        raise ValueError(f"rope_type {rope.kind!r} is not served in this family")
    return model_spec(config, [layer] * count, [_names(i) for i in range(count)], (rope,))


def _names(index: int) -> LayerNames:
    layer = f"model.layers.{index}"
    mlp = MlpNames(
        up=Matrix(modules=(f"{layer}.mlp.gate_up_proj",)),
        down=Matrix(modules=(f"{layer}.mlp.down_proj",)),
    )
    qkv = Matrix(modules=(f"{layer}.self_attn.qkv_proj",))
    return replace(layer_names(index), qkv=qkv, mlps=(mlp,))
