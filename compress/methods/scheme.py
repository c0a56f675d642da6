"""What a weight is rounded to: integers or FP8, groups, symmetry, and how scales are found."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine.formats.float_quantized import DTYPE, LARGEST, to_float8

Scale = Literal["absmax", "mse"]
Kind = Literal["int", "float8"]
# Above it, the nearest value would be the one after the largest, had the grid another.
_FLOAT8_CLIPS = 464.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """A grid of integers, or of FP8 values (e4m3): symmetric then, of 8 bits per channel.

    ``group_size`` None: one scale for each out-feature.

    ``scale``: ``absmax`` covers the largest weight, ``mse`` searches for the clipping that
    rounds with the least squared error. ``dtype`` is that of the scales; None: the weight's.
    """

    kind: Kind = "int"
    bits: int = 8
    group_size: int | None = None
    symmetric: bool = True
    scale: Scale = "absmax"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"weights of {self.bits} bits: 2 to 8 are possible")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"groups of {self.group_size} weights")
        wanted = (self.bits, self.group_size, self.symmetric)
        if self.kind == "float8" and wanted != (8, None, True):
            raise ValueError("FP8 has 8 bits and one symmetric scale for each out-feature")

    @property
    def q_min(self) -> float:
        """The smallest point of the grid, in units of its scale."""
        return -LARGEST if self.kind == "float8" else -(1 << (self.bits - 1))

    @property
    def q_max(self) -> float:
        """The largest."""
        return LARGEST if self.kind == "float8" else (1 << (self.bits - 1)) - 1

    @property
    def code(self) -> torch.dtype:
        """The dtype that points are stored in."""
        return DTYPE if self.kind == "float8" else torch.int8

    def nearest(self, values: Tensor) -> Tensor:
        """The points nearest to ``values``, float32, ties to even; may overwrite ``values``."""
        if self.kind == "float8":
            return to_float8(values).float()
        return values.round_().clamp_(self.q_min, self.q_max)

    def clips(self, values: Tensor) -> Tensor:
        """True where the nearest point would lie outside of the grid."""
        if self.kind == "float8":
            return values.abs() > _FLOAT8_CLIPS
        q = values.round()
        return (q < self.q_min) | (q > self.q_max)

    def groups(self, columns: int) -> int:
        """Number of scales in a row. Raises ``ValueError`` where groups do not divide it."""
        size = self.group_size or columns
        if columns % size:
            raise ValueError(f"groups of {size} do not divide {columns} in-features")
        return columns // size
