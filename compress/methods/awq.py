"""AWQ (arXiv 2306.00978): much-used features are scaled up before rounding, outliers clipped.

The scale is searched over x^r and x^r / w^(1 - r) for r in [0, 1], with x the mean absolute input
of a feature, and w the mean over rows of its absolute weight in shares of its group's largest.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.methods import rtn
from compress.methods.base import Rounded, best, rounded
from compress.methods.grid import Grid, grouped, least_error, make_grid
from compress.methods.inputs import LayerInputs
from compress.methods.scheme import Scheme

NAME = "awq"
_RATIOS = tuple(i / 19 for i in range(20))
_LEAST_SCALE = 1e-4
_LEAST_PEAK = 1e-12
# Gives features that must have one factor the mean of their values.
Tie = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Awq:
    """A scaling that is never worse than 1, and a quantiser that is never worse than RTN.

    ``clip``: the quantiser searches each group's clipping for the least output error;
    without, it is RTN, and the scaling does it all.
    """

    scheme: Scheme
    clip: bool = True

    def search(
        self, weights: Sequence[Tensor], inputs: LayerInputs, tie: Tie | None = None
    ) -> Tensor:
        """See ``Scaling.search``; each weight counts by its relative output error."""
        x_K, w_K = inputs.absmean_K, self._weight_means(weights)
        if tie is not None:
            x_K, w_K = tie(x_K), tie(w_K)
        kept_K, least = torch.ones(len(x_K)), self._error(weights, inputs, None)
        for scale_K in _scales(x_K, w_K):
            error = self._error(weights, inputs, scale_K)
            if error < least:
                kept_K, least = scale_K, error
        return kept_K

    def quantise(
        self, weight_NK: Tensor, inputs: LayerInputs | None, mask_NK: Tensor | None = None
    ) -> Rounded:
        """See ``Quantiser.quantise``; raises ``ValueError`` without inputs."""
        if inputs is None:
            raise ValueError("awq needs calibration")
        kept_NK = weight_NK if mask_NK is None else weight_NK.masked_fill(mask_NK, 0)
        grids = {rtn.NAME: make_grid(kept_NK, self.scheme)}
        if self.clip and self.scheme.group_size is not None:
            grids = {NAME: _clipped_grid(kept_NK, self.scheme, inputs), **grids}
        weights = {name: grid.weight(grid.quantize(kept_NK)) for name, grid in grids.items()}
        candidates = {name: weight.dequantize() for name, weight in weights.items()}
        outcome = best(weight_NK, candidates, inputs, None)
        return rounded(kept_NK, weights[outcome.method], grids[outcome.method], outcome)

    def _weight_means(self, weights: Sequence[Tensor]) -> Tensor:
        sum_K = torch.zeros(weights[0].shape[1])
        for weight_NK in weights:
            w_NGS = grouped(weight_NK, self.scheme.groups(weight_NK.shape[1])).abs()
            sum_K += w_NGS.div_(w_NGS.amax(2, keepdim=True).clamp_min(_LEAST_PEAK)).sum(0).flatten()
        return sum_K / sum(len(weight_NK) for weight_NK in weights)

    def _error(
        self, weights: Sequence[Tensor], inputs: LayerInputs, scale_K: Tensor | None
    ) -> float:
        error = 0.0
        for weight_NK in weights:
            scaled_NK = weight_NK if scale_K is None else weight_NK * scale_K
            grid = make_grid(scaled_NK, self.scheme)
            found_NK = grid.weight(grid.quantize(scaled_NK)).dequantize()
            if scale_K is not None:
                found_NK /= scale_K
            error += inputs.relative_error(weight_NK, found_NK)
        return error


def _scales(x_K: Tensor, w_K: Tensor) -> Iterator[Tensor]:
    x_K, w_K = x_K.clamp_min(_LEAST_SCALE), w_K.clamp_min(_LEAST_SCALE)
    for ratio in _RATIOS:
        for raw_K in (x_K**ratio, x_K**ratio / w_K ** (1 - ratio)):
            bounded_K = raw_K.clamp_min(_LEAST_SCALE)
            scale_K = bounded_K / (bounded_K.max() * bounded_K.min()).sqrt()
            if bool(scale_K.isfinite().all()):
                yield scale_K


def _clipped_grid(weight_NK: Tensor, scheme: Scheme, inputs: LayerInputs) -> Grid:
    """Clippings by the output error of each group alone."""
    groups = scheme.groups(weight_NK.shape[1])
    size = weight_NK.shape[1] // groups
    blocks_GSS = torch.stack(
        [inputs.hessian_KK[i : i + size, i : i + size] for i in range(0, groups * size, size)]
    )

    def error(difference_NGS: Tensor) -> Tensor:
        difference_GNS = difference_NGS.transpose(0, 1)
        return ((difference_GNS @ blocks_GSS) * difference_GNS).sum(2).t()

    dtype = scheme.dtype or weight_NK.dtype
    scale_NG, zero_NG = least_error(grouped(weight_NK, groups), scheme, dtype, error)
    return Grid(scheme, scale_NG, zero_NG)
