"""Weights with a scale, and perhaps a zero point, for each group of columns."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """The weight is ``(q - zero) * scale``; ``G`` counts groups of ``group`` columns.

    Attributes:
        q_NK: int8; of 4 bits in [-8, 7].
        scale_NG: floating point. The last group may be shorter than ``group``.
        zero_NG: int8 in the range of q, or None where all are 0.
        group: columns of a group; 0 for as many as make G equal groups.
        bits: 4 or 8.
    """

    q_NK: Tensor
    scale_NG: Tensor
    zero_NG: Tensor | None = None
    group: int = 0
    bits: int = 4

    def __post_init__(self) -> None:
        if self.group == 0:
            object.__setattr__(self, "group", self.q_NK.shape[1] // self.scale_NG.shape[1])
        N, K = self.q_NK.shape
        groups = (N, -(-K // self.group))
        assert self.scale_NG.shape == groups
        assert self.zero_NG is None or self.zero_NG.shape == groups

    def integers(self) -> Tensor:
        """int32 [N, K]: ``q - zero``."""
        if self.zero_NG is None:
            return self.q_NK.int()
        return self.q_NK.int() - self._spread(self.zero_NG.int())

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        return self.integers() * self._spread(self.scale_NG.float())

    def rows(self, ids_T: Tensor | slice) -> "GroupedWeight":
        """Some out-features."""
        zero_TG = None if self.zero_NG is None else self.zero_NG[ids_T]
        scale_TG = self.scale_NG[ids_T]
        return GroupedWeight(self.q_NK[ids_T], scale_TG, zero_TG, self.group, self.bits)

    def _spread(self, values_NG: Tensor) -> Tensor:
        return values_NG.repeat_interleave(self.group, 1)[:, : self.q_NK.shape[1]]


def by_group(g_idx_K: Tensor, group: int) -> Tensor | None:
    """The columns of a row, group after group, where ``g_idx_K`` has each column's group.

    None where they lie so already. Raises ``ValueError`` unless each group but the last has
    ``group`` columns.
    """
    in_order_K = torch.arange(len(g_idx_K)) // group
    if torch.equal(g_idx_K.long(), in_order_K):
        return None
    found_K, order_K = g_idx_K.long().sort(stable=True)
    if not torch.equal(found_K, in_order_K):
        raise ValueError(f"g_idx does not divide {len(g_idx_K)} columns into groups of {group}")
    return order_K
