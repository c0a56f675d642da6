"""Rotary position embedding (RoFormer), in Hugging Face's half-split order."""

import math

import torch
from torch import Tensor

from engine.models.spec import RopeSpec


class Rotary:
    """Cosines and sines of all positions of the context, float32 [S, D] (D turned features)."""

    def __init__(self, rope: RopeSpec, context_length: int) -> None:
        angles = torch.outer(torch.arange(context_length).float(), frequencies(rope))
        angles = torch.cat((angles, angles), dim=1)
        self._cos_SD, self._sin_SD = angles.cos(), angles.sin()
        if rope.amplitude != 1.0:
            self._cos_SD *= rope.amplitude
            self._sin_SD *= rope.amplitude

    def tables(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, 1, D] of a step's tokens."""
        return self._cos_SD[positions_T, None], self._sin_SD[positions_T, None]


def rotate(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """``x`` turned by its positions."""
    first, second = x_THD.chunk(2, dim=-1)
    return x_THD * cos_T1D + torch.cat((-second, first), dim=-1) * sin_T1D


def rotate_part(x_THD: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
    """As ``rotate``, of the first R features only."""
    turned = cos_T1R.shape[-1]
    head = rotate(x_THD[..., :turned], cos_T1R, sin_T1R)
    return torch.cat((head, x_THD[..., turned:]), dim=-1)


def frequencies(rope: RopeSpec) -> Tensor:
    """Radians by which a pair of features turns from one position to the next, float32 [D / 2]."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    plain = 1.0 / rope.theta**exponents
    match rope.kind:
        case "default":
            return plain
        case "linear":
            return plain / rope.factor
        case "llama3":
            return _llama3(plain, rope)
        case "yarn":
            return _yarn(plain, rope)
        case "longrope":
            return 1.0 / (torch.tensor(rope.divisors) * rope.theta**exponents)


def _llama3(plain: Tensor, rope: RopeSpec) -> Tensor:
    """Llama 3.1: long waves are stretched, short ones kept, those between blended."""
    turns = rope.original_length * plain / (2 * math.pi)
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * plain / rope.factor + kept * plain


def _yarn(plain: Tensor, rope: RopeSpec) -> Tensor:
    """YaRN: slow features are interpolated, fast ones kept, with a ramp between."""
    low, high = rope.ramp
    stretched = ((torch.arange(len(plain)) - low) / (high - low)).clamp(0, 1)
    return plain / rope.factor * stretched + plain * (1 - stretched)
