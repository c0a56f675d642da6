"""Mixtral: Mistral with a mixture of experts as MLP."""

from dataclasses import replace

from engine.models import mistral
from engine.models.config import Config, whole
from engine.models.spec import ExpertsSpec, LayerNames, Matrix, MlpNames, ModelSpec


def spec(config: Config) -> ModelSpec:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where the config makes no sense."""
    base = mistral.spec({"sliding_window": None, "rope_theta": 1e6} | config)
    experts = ExpertsSpec(
        count=whole(config, "num_local_experts"),
        chosen=whole(config, "num_experts_per_tok"),
        normalise=True,
    )
    layer = replace(base.layer, experts=experts)
    names = (_names(name, i, experts.count) for i, name in enumerate(base.names))
    return replace(base, layers=(layer,) * len(base.layers), names=tuple(names))


def _names(names: LayerNames, index: int, count: int) -> LayerNames:
    block = f"model.layers.{index}.block_sparse_moe"
    mlps = tuple(
        MlpNames(
            up=Matrix(modules=(f"{block}.experts.{e}.w1", f"{block}.experts.{e}.w3")),
            down=Matrix(modules=(f"{block}.experts.{e}.w2",)),
        )
        for e in range(count)
    )
    return replace(names, mlps=mlps, router=f"{block}.gate")
