"""The loop that GPTQ and SparseGPT share: one in-feature after the other is projected, and
its error is spread over those that follow (Optimal Brain Surgeon, arXiv 2210.17323 and
2301.00774).

Weights lie transposed here, [K, N], so that an in-feature is a contiguous row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from compress.methods.grid import Grid

# Rows whose errors are spread at once.
BLOCK = 128
# (index of an in-feature, its weights [N]) -> projected [N].
Project = Callable[[int, Tensor], Tensor]
# (first of a span, its weights [S, N], its diagonal of the factor [S]): called before the span.
BeginSpan = Callable[[int, Tensor, Tensor], None]


def column_loop(
    weight_KN: Tensor,
    upper_KK: Tensor,
    project: Project,
    begin: BeginSpan | None = None,
    span: int = BLOCK,
) -> None:
    """Replaces each row of ``weight_KN`` by its projection, in place, first to last.

    Args:
        weight_KN: float32; what rows become after earlier errors is given to ``project``.
        upper_KK: see ``hessian.factor``.
        project: what a row becomes.
        begin: is told of each ``span`` of rows before the first of them is projected.
        span: must divide ``BLOCK``.
    """
    rows = len(weight_KN)
    diagonal_K = upper_KK.diagonal()
    error_BN = torch.empty(min(BLOCK, rows), weight_KN.shape[1])
    for first in range(0, rows, BLOCK):
        last = min(first + BLOCK, rows)
        for k in range(first, last):
            if begin is not None and (k - first) % span == 0:
                end = min(k + span, last)
                begin(k, weight_KN[k:end], diagonal_K[k:end])
            projected_N = project(k, weight_KN[k])
            error_N = torch.sub(weight_KN[k], projected_N, out=error_BN[k - first])
            error_N.div_(diagonal_K[k])
            weight_KN[k] = projected_N
            if k + 1 < last:
                weight_KN[k + 1 : last].addr_(upper_KK[k, k + 1 : last], error_N, alpha=-1)
        if last < rows:
            spread_KB = upper_KK[first:last, last:].t()
            weight_KN[last:].addmm_(spread_KB, error_BN[: last - first], alpha=-1)


class ColumnRounder:
    """Rounds in-features to a grid, and keeps its points, in-feature by in-feature."""

    def __init__(self, grid: Grid, rows: int) -> None:
        self._scheme = grid.scheme
        self._scale_GN = grid.scale_NG.float().t().contiguous()
        zero_NG = grid.zero_NG
        self._zero_GN = None if zero_NG is None else zero_NG.float().t().contiguous()
        self._size = rows // len(self._scale_GN)
        self.q_KN = torch.empty(rows, self._scale_GN.shape[1], dtype=self._scheme.code)

    def __call__(self, k: int, weight_N: Tensor) -> Tensor:
        """The nearest grid points of in-feature ``k``."""
        group = k // self._size
        scale_N = self._scale_GN[group]
        q_N = weight_N / scale_N
        if self._zero_GN is None:
            q_N = self._scheme.nearest(q_N)
            self.q_KN[k] = q_N
            return q_N.mul_(scale_N)
        zero_N = self._zero_GN[group]
        q_N = self._scheme.nearest(q_N.add_(zero_N))
        self.q_KN[k] = q_N
        return q_N.sub_(zero_N).mul_(scale_N)
