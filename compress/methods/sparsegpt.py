"""SparseGPT (arXiv 2301.00774): drops weights and corrects those that follow in their row.

``Joint`` also rounds in the same loop, so that later weights make up for both errors and
dropped weights stay 0, which both kinds of grid represent exactly.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.methods import magnitude
from compress.methods.base import Outcome, Pruned, Rounded, best, rounded
from compress.methods.columns import BLOCK, ColumnRounder, Project, column_loop
from compress.methods.grid import make_grid
from compress.methods.inputs import LayerInputs
from compress.methods.masks import Sparsity, lowest
from compress.methods.scheme import Scheme

NAME = "sparsegpt"
JOINT = "sparsegpt+gptq"
AFTERWARDS = "sparsegpt+rtn"
BASELINE = "magnitude+rtn"


@dataclass(frozen=True, slots=True)
class SparseGpt:
    """Never worse than magnitude at the same sparsity: the better of the two is kept."""

    sparsity: Sparsity

    def prune(self, weight_NK: Tensor, inputs: LayerInputs) -> Pruned:
        """See ``Pruner.prune``."""
        upper_KK, rung = _factor(inputs)
        masks = {magnitude.NAME: magnitude.magnitude_mask(weight_NK, self.sparsity)}
        pruned = {magnitude.NAME: weight_NK.float().masked_fill(masks[magnitude.NAME], 0)}
        if upper_KK is not None:
            found_NK, mask_NK = _loop(weight_NK, upper_KK, self.sparsity, lambda _, w_N: w_N)
            masks, pruned = {NAME: mask_NK, **masks}, {NAME: found_NK, **pruned}
        outcome = best(weight_NK, pruned, inputs, rung)
        kept = outcome.method
        return Pruned(weight_NK=pruned[kept], mask_NK=masks[kept], outcome=outcome)


@dataclass(frozen=True, slots=True)
class Joint:
    """Prunes and rounds in one loop.

    The grid is that of the weights as pruning alone leaves them. Never worse than rounding
    those to nearest, nor than magnitude pruning rounded to nearest on the same grid.
    """

    sparsity: Sparsity
    scheme: Scheme

    def quantise(
        self, weight_NK: Tensor, inputs: LayerInputs | None, mask_NK: Tensor | None = None
    ) -> Rounded:
        """See ``Quantiser.quantise``; raises ``ValueError`` without inputs, or with a mask."""
        if inputs is None or mask_NK is not None:
            raise ValueError("the joint loop needs calibration, and makes its own mask")
        dtype = self.scheme.dtype or weight_NK.dtype
        scheme = replace(self.scheme, dtype=dtype)
        upper_KK, rung = _factor(inputs)
        small_NK = magnitude.magnitude_mask(weight_NK, self.sparsity)
        grid_NK, contenders = weight_NK, dict[str, Tensor]()
        if upper_KK is not None:
            grid_NK, _ = _loop(weight_NK, upper_KK, self.sparsity, lambda _, w_N: w_N)
        grid = make_grid(grid_NK, scheme)
        if upper_KK is not None:
            rounder = ColumnRounder(grid, weight_NK.shape[1])
            _loop(weight_NK, upper_KK, self.sparsity, rounder)
            contenders[JOINT] = rounder.q_KN.t().contiguous()
            contenders[AFTERWARDS] = grid.quantize(grid_NK)
        contenders[BASELINE] = grid.quantize(weight_NK.masked_fill(small_NK, 0))
        weights = {name: grid.weight(q_NK) for name, q_NK in contenders.items()}
        candidates = {name: weight.dequantize() for name, weight in weights.items()}
        outcome: Outcome = best(weight_NK, candidates, inputs, rung)
        return rounded(weight_NK, weights[outcome.method], grid, outcome)


def _factor(inputs: LayerInputs) -> tuple[Tensor | None, str]:
    found = inputs.ordered_factor(by_activation=False).factor
    return found.upper_KK, found.rung


def _loop(
    weight_NK: Tensor, upper_KK: Tensor, sparsity: Sparsity, project: Project
) -> tuple[Tensor, Tensor]:
    """Weights [N, K] and mask; ``project`` is what happens to kept weights, 0 stays 0."""
    columns = weight_NK.shape[1]
    mask_KN = torch.zeros(columns, weight_NK.shape[0], dtype=torch.bool)

    def choose(first: int, weight_SN: Tensor, diagonal_S: Tensor) -> None:
        score_SN = (weight_SN / diagonal_S[:, None]).square_()
        # A block shares one threshold; neighbours of an N:M pattern lie in a row.
        chosen_NS = lowest(score_SN.t(), sparsity, per_row=False)
        mask_KN[first : first + len(weight_SN)] = chosen_NS.t()

    def drop(k: int, weight_N: Tensor) -> Tensor:
        return project(k, weight_N.masked_fill(mask_KN[k], 0))

    span = BLOCK if sparsity.pattern is None else sparsity.pattern[1]
    weight_KN = weight_NK.float().t().contiguous()
    column_loop(weight_KN, upper_KK, drop, choose, span)
    return weight_KN.t().contiguous(), mask_KN.t().contiguous()
