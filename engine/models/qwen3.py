"""Qwen3: Llama with RMSNorm over each head of q and k."""

from dataclasses import replace

from engine.models.config import LLAMA_NORMS, Config, layer_names, layer_spec, model_spec
from engine.models.qwen2 import qwen_windows
from engine.models.rope import rope_spec
from engine.models.spec import LayerNames, ModelSpec

_NORMS = LLAMA_NORMS | {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}


def spec(config: Config) -> ModelSpec:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where the config makes no sense."""
    layer = layer_spec(config, rope=0, qk_norm="head")
    layers = [replace(layer, window=window) for window in qwen_windows(config)]
    bias = bool(config.get("attention_bias"))
    names = [qwen3_names(i, bias) for i in range(len(layers))]
    return model_spec(config, layers, names, (rope_spec(config, layer.head_dim),))


def qwen3_names(index: int, bias: bool) -> LayerNames:
    """Names of layer ``index``; ``bias``: the attention's matrices have one."""
    return layer_names(index, _NORMS, qkv_bias=bias, o_bias=bias)
