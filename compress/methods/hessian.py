"""Factors a Hessian for the column loop; a bad one climbs a ladder that callers report.

The factor is the upper U with U^T U = H^-1: with J the reversal of rows, J H J = L L^T
gives U = J L^-1 J, one Cholesky factorisation and one triangular inverse.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_RUNG = "damping 0.01"
LAST_RUNG = "none"
_DAMPINGS = (0.01, 0.1, 1.0)
_FLOOR = 0.01
_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Factor:
    """``upper_KK`` is None on the last rung; ``rung`` says what it took."""

    upper_KK: Tensor | None
    rung: str


def factor(hessian_KK: Tensor, tokens: int, order_K: Tensor | None = None) -> Factor:
    """The factor of a damped Hessian, float32, by the first rung that holds.

    Damping is a share of the mean diagonal. Features that calibration never moved get a
    diagonal of 1, so that they are rounded and share no error. Where ``tokens`` are fewer
    than features, the Hessian cannot have full rank and the first damping is left out.

    Args:
        hessian_KK: float32, left as it is; a matrix of that size is held twice more.
        tokens: rows that it is the mean of.
        order_K: the order of features in the factor; None leaves them.
    """
    diagonal_K = hessian_KK.diagonal()
    if not bool(diagonal_K.isfinite().all()):
        return Factor(None, LAST_RUNG)
    alive_K = torch.where(diagonal_K > 0, diagonal_K, 1.0)
    order_K = torch.arange(len(hessian_KK)) if order_K is None else order_K
    matrix = _Damped(hessian_KK, alive_K, order_K.flip(0))
    mean, largest = float(alive_K.mean()), float(alive_K.max())
    for damping in _DAMPINGS[tokens < len(hessian_KK) :]:
        if (upper_KK := matrix.factor(damping * mean)) is not None:
            return Factor(upper_KK, f"damping {damping:g}")
    if (upper_KK := matrix.factor(_FLOOR * largest)) is not None:
        return Factor(upper_KK, "diagonal floor")
    if (upper_KK := matrix.factor(_FLOOR * largest, torch.float64)) is not None:
        return Factor(upper_KK.float(), "float64")
    return Factor(None, LAST_RUNG)


@dataclass(frozen=True, slots=True)
class _Damped:
    hessian_KK: Tensor
    diagonal_K: Tensor
    reversed_K: Tensor

    def factor(self, added: float, dtype: torch.dtype = torch.float32) -> Tensor | None:
        matrix_KK = self.hessian_KK[self.reversed_K[:, None], self.reversed_K].to(dtype)
        matrix_KK.diagonal().copy_(self.diagonal_K[self.reversed_K]).add_(added)
        # In place: a symmetric matrix is its own transpose, as LAPACK lays matrices out.
        lower_KK, info = matrix_KK.mT, torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(lower_KK, out=(lower_KK, info))
        if int(info):
            return None
        inverse_KK = _inverse(lower_KK)
        del matrix_KK, lower_KK
        upper_KK = inverse_KK.flip(0, 1)
        # NaN is the least and the largest; a comparison of all would take as much again.
        least, largest = torch.aminmax(upper_KK)
        return upper_KK if bool(least.isfinite() & largest.isfinite()) else None


def _inverse(lower_KK: Tensor) -> Tensor:
    """Of a lower triangular matrix, block row by block row, in no more memory than its own."""
    inverse_KK = torch.zeros_like(lower_KK)
    for begin in range(0, len(lower_KK), _BLOCK):
        rows = slice(begin, begin + _BLOCK)
        corner = lower_KK[rows, rows]
        unit = torch.eye(len(corner), dtype=corner.dtype)
        solved = torch.linalg.solve_triangular(corner, unit, upper=False)
        inverse_KK[rows, rows] = solved
        if begin:
            before = lower_KK[rows, :begin] @ inverse_KK[:begin, :begin]
            inverse_KK[rows, :begin] = -(solved @ before)
    return inverse_KK
