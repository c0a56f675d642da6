"""GPTQ (arXiv 2210.17323): rounds in-feature by in-feature and corrects those that follow.

With static activation order the most used features are rounded first, on grids that were
fixed before, so that groups stay as they lie and the file needs no index of groups.
"""

from dataclasses import dataclass

from torch import Tensor

from compress.methods import rtn
from compress.methods.base import Rounded, best, rounded
from compress.methods.columns import ColumnRounder, column_loop
from compress.methods.grid import Grid, make_grid
from compress.methods.hessian import Factor
from compress.methods.inputs import LayerInputs
from compress.methods.scheme import Scheme

NAME = "gptq"


@dataclass(frozen=True, slots=True)
class Gptq:
    """Never worse than RTN on the same grid: the better of the two is kept."""

    scheme: Scheme
    by_activation: bool = True

    def quantise(
        self, weight_NK: Tensor, inputs: LayerInputs | None, mask_NK: Tensor | None = None
    ) -> Rounded:
        """See ``Quantiser.quantise``; raises ``ValueError`` without inputs."""
        if inputs is None:
            raise ValueError("gptq needs calibration")
        kept_NK = weight_NK if mask_NK is None else weight_NK.masked_fill(mask_NK, 0)
        grid = make_grid(kept_NK, self.scheme)
        contenders = {rtn.NAME: grid.quantize(kept_NK)}
        ordered = inputs.ordered_factor(by_activation=self.by_activation)
        if ordered.factor.upper_KK is not None:
            loop = _loop(kept_NK, grid, ordered.factor, ordered.order_K, mask_NK)
            contenders = {NAME: loop, **contenders}
        weights = {name: grid.weight(q_NK) for name, q_NK in contenders.items()}
        candidates = {name: weight.dequantize() for name, weight in weights.items()}
        outcome = best(weight_NK, candidates, inputs, ordered.factor.rung)
        return rounded(kept_NK, weights[outcome.method], grid, outcome)


def _loop(
    weight_NK: Tensor, grid: Grid, factor: Factor, order_K: Tensor, mask_NK: Tensor | None
) -> Tensor:
    """The points of the grid, [N, K]."""
    assert factor.upper_KK is not None
    order, columns = order_K.tolist(), weight_NK.shape[1]
    rounder = ColumnRounder(grid, columns)
    mask_KN = None if mask_NK is None else mask_NK.t().contiguous()

    def project(place: int, weight_N: Tensor) -> Tensor:
        k = order[place]
        if mask_KN is not None:
            weight_N = weight_N.masked_fill(mask_KN[k], 0)
        return rounder(k, weight_N)

    weight_KN = weight_NK.float().t()[order_K].contiguous()
    column_loop(weight_KN, factor.upper_KK, project)
    return rounder.q_KN.t().contiguous()
