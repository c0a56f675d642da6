"""Feed-forward parts of a layer: gated, plain, or a mixture of experts.

Shape letters: T tokens, K hidden features, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels import kernel
from engine.layers.linear import Linear
from engine.models.spec import ExpertsSpec, LayerSpec

Mlp = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpWeights:
    """``up`` gives gates and values, one after the other, where the MLP is gated."""

    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsWeights:
    """A mixture: its router, and the experts."""

    router: Linear
    experts: tuple[MlpWeights, ...]


def make_mlp(spec: LayerSpec, weights: MlpWeights | ExpertsWeights, backend: str) -> Mlp:
    """[T, K] -> [T, K]."""
    if isinstance(weights, ExpertsWeights):
        assert spec.experts is not None
        experts = [make_mlp(spec, one, backend) for one in weights.experts]
        return make_experts(spec.experts, weights.router, experts)
    activate, up, down = kernel("activation", backend), weights.up, weights.down
    return lambda x_TK: down(activate(up(x_TK), spec.activation, gated=spec.gated))


def make_experts(spec: ExpertsSpec, router: Linear, experts: list[Mlp]) -> Mlp:
    """[T, K] -> [T, K]: each token through the experts that the router gives most to.

    A token's experts are added in ascending order, whatever the other tokens are.
    """

    def mixture(x_TK: Tensor) -> Tensor:
        shares, chosen = router(x_TK).softmax(dim=1).topk(spec.chosen, dim=1)
        if spec.normalise:
            shares = shares / shares.sum(dim=1, keepdim=True)
        out_TK = torch.zeros_like(x_TK)
        for index in chosen.unique().tolist():
            rows, places = torch.where(chosen == index)
            part = experts[index](x_TK[rows]) * shares[rows, places, None]
            out_TK.index_add_(0, rows, part)
        return out_TK

    return mixture
