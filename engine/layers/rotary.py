"""Rotary position embedding (RoFormer), in Hugging Face's half-split order."""

import torch
from torch import Tensor


class Rotary:
    """Cosines and sines of all positions of the context, float32 [S, D]."""

    def __init__(self, head_dim: int, context_length: int, theta: float) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        frequencies = 1.0 / theta**exponents
        angles = torch.outer(torch.arange(context_length).float(), frequencies)
        angles = torch.cat((angles, angles), dim=1)
        self._cos_SD, self._sin_SD = angles.cos(), angles.sin()

    def tables(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, 1, D] of a step's tokens."""
        return self._cos_SD[positions_T, None], self._sin_SD[positions_T, None]


def rotate(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """``x`` turned by its positions."""
    first, second = x_THD.chunk(2, dim=-1)
    return x_THD * cos_T1D + torch.cat((-second, first), dim=-1) * sin_T1D
