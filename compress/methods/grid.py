"""The grid that a weight is rounded to: scales and zero points of its groups.

Scale and rounding are compressed-tensors' (``calculate_qparams``, ``quantize``): symmetric
scale = absmax / ((2^b - 1) / 2), of FP8 absmax / 448, asymmetric (max - min) / (2^b - 1) with an
integer zero point, scales in the weight's dtype; q = round-half-even(clamp(w / scale + zero)).
That division, and zero points, are in float32 for every dtype, since in bf16 they would round
twice.

Shape letters: N out-features, K in-features, G groups of a row, S in-features of a group.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.methods.scheme import Scheme
from engine.formats.float_quantized import Float8Weight
from engine.formats.grouped import GroupedWeight
from engine.formats.int_quantized import Int8Weight

RoundedWeight = Int8Weight | GroupedWeight | Float8Weight

# Clippings that ``mse`` tries, as shares of the full range.
_SHRINKS = tuple(1.0 - 0.02 * i for i in range(26))
# Rows are done in blocks of so many weights, whose temporaries fit a processor's cache.
_BLOCK_WEIGHTS = 1 << 18


@dataclass(frozen=True, slots=True)
class Grid:
    """``scale_NG`` in the scheme's dtype, ``zero_NG`` int8 or None where it is symmetric."""

    scheme: Scheme
    scale_NG: Tensor
    zero_NG: Tensor | None = None

    def quantize(self, weight_NK: Tensor) -> Tensor:
        """The nearest points, [N, K] in the scheme's ``code``."""
        q_NK = torch.empty(weight_NK.shape, dtype=self.scheme.code)
        for rows in row_blocks(weight_NK):
            w_NGS = grouped(weight_NK[rows], self.scale_NG.shape[1])
            zero_NG = None if self.zero_NG is None else self.zero_NG[rows]
            q_NGS = _scaled(w_NGS, self.scale_NG[rows], zero_NG)
            q_NK[rows] = self.scheme.nearest(q_NGS).flatten(1).to(self.scheme.code)
        return q_NK

    def clipped_share(self, weight_NK: Tensor) -> float:
        """Share of weights whose nearest grid point lies outside the grid."""
        clipped = 0
        for rows in row_blocks(weight_NK):
            w_NGS = grouped(weight_NK[rows], self.scale_NG.shape[1])
            zero_NG = None if self.zero_NG is None else self.zero_NG[rows]
            q_NGS = _scaled(w_NGS, self.scale_NG[rows], zero_NG)
            clipped += int(self.scheme.clips(q_NGS).sum())
        return clipped / weight_NK.numel()

    def weight(self, q_NK: Tensor) -> RoundedWeight:
        """The points with their scales, as the engine knows them."""
        if self.scheme.kind == "float8":
            return Float8Weight(q_NK, self.scale_NG[:, 0])
        if self.scheme.bits == 8 and self.scheme.symmetric and self.scale_NG.shape[1] == 1:
            return Int8Weight(q_NK, self.scale_NG[:, 0])
        return GroupedWeight(q_NK, self.scale_NG, self.zero_NG)


def make_grid(weight_NK: Tensor, scheme: Scheme) -> Grid:
    """The grid for a weight of finite values. Raises ``ValueError`` where groups do not fit."""
    groups = scheme.groups(weight_NK.shape[1])
    dtype = scheme.dtype or weight_NK.dtype
    scales, zeros = [], []
    for rows in row_blocks(weight_NK):
        w_NGS = grouped(weight_NK[rows], groups)
        scale_NG, zero_NG = _range(w_NGS, scheme, 1.0, dtype)
        if scheme.scale == "mse":
            scale_NG, zero_NG = least_error(w_NGS, scheme, dtype, _squares)
        scales.append(scale_NG)
        zeros.append(zero_NG)
    zero_NG = None if scheme.symmetric else torch.cat([zero for zero in zeros if zero is not None])
    return Grid(scheme, torch.cat(scales), zero_NG)


def row_blocks(weight_NK: Tensor) -> Iterator[slice]:
    """Slices of rows that cover the weight."""
    rows = max(1, _BLOCK_WEIGHTS // weight_NK.shape[1])
    for first in range(0, weight_NK.shape[0], rows):
        yield slice(first, first + rows)


def grouped(weight_NK: Tensor, groups: int) -> Tensor:
    """float32 [N, G, S]."""
    return weight_NK.float().view(len(weight_NK), groups, -1)


def _range(
    w_NGS: Tensor, scheme: Scheme, shrink: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scale in ``dtype`` and zero point for a range of ``shrink`` times the weights'.

    A scale is that dtype's epsilon where all weights are zero, never 0.
    """
    low_NG, high_NG = w_NGS.amin(2).clamp_max(0), w_NGS.amax(2).clamp_min(0)
    steps = scheme.q_max - scheme.q_min
    if scheme.symmetric:
        scale_NG = (torch.maximum(-low_NG, high_NG) * shrink).to(dtype) / (steps / 2)
    else:
        scale_NG = ((high_NG - low_NG) * shrink).to(dtype) / steps
    scale_NG.masked_fill_(scale_NG == 0, torch.finfo(dtype).eps)
    if scheme.symmetric:
        return scale_NG, None
    zero_NG = (scheme.q_min - low_NG * shrink / scale_NG.float()).round_()
    return scale_NG, zero_NG.clamp_(scheme.q_min, scheme.q_max).to(torch.int8)


def least_error(
    w_NGS: Tensor, scheme: Scheme, dtype: torch.dtype, error: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of the clipping whose rounding has the least ``error``.

    ``error`` gets differences [N, G, S], which it may overwrite, and gives [N, G].
    """
    best, best_zero = _range(w_NGS, scheme, 1.0, dtype)
    least_NG = torch.full(best.shape, torch.inf)
    for shrink in _SHRINKS:
        scale_NG, zero_NG = _range(w_NGS, scheme, shrink, dtype)
        q_NGS = scheme.nearest(_scaled(w_NGS, scale_NG, zero_NG))
        if zero_NG is not None:
            q_NGS -= zero_NG[..., None]
        error_NG = error(q_NGS.mul_(scale_NG.float()[..., None]).sub_(w_NGS))
        better_NG = error_NG < least_NG
        least_NG = torch.where(better_NG, error_NG, least_NG)
        best = torch.where(better_NG, scale_NG, best)
        if zero_NG is not None and best_zero is not None:
            best_zero = torch.where(better_NG, zero_NG, best_zero)
    return best, best_zero


def _squares(difference_NGS: Tensor) -> Tensor:
    return difference_NGS.square_().sum(2)


def _scaled(w_NGS: Tensor, scale_NG: Tensor, zero_NG: Tensor | None) -> Tensor:
    """float32, in units of the grid."""
    q_NGS = w_NGS / scale_NG.float()[..., None]
    return q_NGS if zero_NG is None else q_NGS.add_(zero_NG[..., None])
