"""What a weight is rounded to: bits, groups, symmetry, and how scales are found."""

from dataclasses import dataclass
from typing import Literal

import torch

Scale = Literal["absmax", "mse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """An integer grid. ``group_size`` None: one scale for each out-feature.

    ``scale``: ``absmax`` covers the largest weight, ``mse`` searches for the clipping that
    rounds with the least squared error. ``dtype`` is that of the scales; None: the weight's.
    """

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

    @property
    def q_min(self) -> int:
        """The smallest integer."""
        return -(1 << (self.bits - 1))

    @property
    def q_max(self) -> int:
        """The largest integer."""
        return (1 << (self.bits - 1)) - 1

    def groups(self, columns: int) -> int:
        """Number of scales in a row. Raises ``ValueError`` where groups do not divide it."""
        size = self.group_size or columns
        if columns % size:
            raise ValueError(f"groups of {size} do not divide {columns} in-features")
        return columns // size
