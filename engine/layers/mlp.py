"""Feed-forward parts of a layer: gated, plain, or a mixture of experts.

Shape letters: T tokens, K hidden features, E experts.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.layers.linear import Linear
from engine.models.spec import Activation, ExpertsSpec, LayerSpec

Mlp = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def make_mlp(spec: LayerSpec, up: Linear, down: Linear) -> Mlp:
    """[T, K] -> [T, K]; ``up`` gives gate and up, one after the other, where it is gated."""
    activate = ACTIVATIONS[spec.activation]

    def gated(x_TK: Tensor) -> Tensor:
        gate, value = up(x_TK).chunk(2, dim=1)
        return down(activate(gate).mul_(value))

    def plain(x_TK: Tensor) -> Tensor:
        return down(activate(up(x_TK)))

    return gated if spec.gated else plain


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
