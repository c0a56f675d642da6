"""Qwen3-MoE: Qwen3 with a mixture of experts as MLP in most layers."""

from dataclasses import replace

from engine.models.config import Config, layer_spec, model_spec, sliding_window, whole
from engine.models.qwen3 import qwen3_names
from engine.models.rope import rope_spec
from engine.models.spec import ExpertsSpec, LayerNames, Matrix, MlpNames, ModelSpec


def spec(config: Config) -> ModelSpec:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where the config makes no sense."""
    window = sliding_window(config) if config.get("use_sliding_window") else None
    plain = layer_spec(config, rope=0, qk_norm="head", window=window)
    experts = ExpertsSpec(
        count=whole(config, "num_experts" if "num_experts" in config else "num_local_experts"),
        chosen=whole(config, "num_experts_per_tok"),
        normalise=bool(config.get("norm_topk_prob", False)),
    )
    sparse = replace(plain, experts=experts, mlp_size=whole(config, "moe_intermediate_size"))
    dense, step = config.get("mlp_only_layers") or [], whole(config, "decoder_sparse_step", 1)
    bias = bool(config.get("attention_bias"))
    layers, names = [], []
    for i in range(whole(config, "num_hidden_layers")):
        has_experts = i not in dense and (i + 1) % step == 0
        layers.append(sparse if has_experts else plain)
        name = qwen3_names(i, bias)
        names.append(_with_experts(name, i, experts.count) if has_experts else name)
    return model_spec(config, layers, names, (rope_spec(config, plain.head_dim),))


def _with_experts(names: LayerNames, index: int, count: int) -> LayerNames:
    mlp = f"model.layers.{index}.mlp"
    experts = (f"{mlp}.experts.{e}" for e in range(count))
    mlps = tuple(
        MlpNames(
            up=Matrix(modules=(f"{expert}.gate_proj", f"{expert}.up_proj")),
            down=Matrix(modules=(f"{expert}.down_proj",)),
        )
        for expert in experts
    )
    return replace(names, mlps=mlps, router=f"{mlp}.gate")
