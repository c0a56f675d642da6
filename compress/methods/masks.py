"""Which weights a pruner drops: the lowest scores, by share or N of M neighbours.

Masks are True where a weight is dropped.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

UNSTRUCTURED = "unstructured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsity:
    """``share`` of the weights is dropped; ``structure`` is ``unstructured`` or ``N:M``, where
    of M neighbours in a row at most N stay.
    """

    share: float = 0.5
    structure: str = UNSTRUCTURED

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"sparsity must lie between 0 and 1, not be {self.share}")
        pattern = self.pattern
        if pattern is not None and abs(1 - pattern[0] / pattern[1] - self.share) > 1e-9:
            raise ValueError(f"structure {self.structure} is no sparsity of {self.share}")

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(N, M), or None where it is unstructured. Raises ``ValueError``."""
        if self.structure == UNSTRUCTURED:
            return None
        match = re.fullmatch(r"(\d+):(\d+)", self.structure)
        if match is None or not 0 < int(match[1]) < int(match[2]):
            raise ValueError(f"structure {self.structure!r} is neither unstructured nor N:M")
        return int(match[1]), int(match[2])

    def check(self, columns: int) -> None:
        """Raises ``ValueError`` where rows of ``columns`` weights do not fit."""
        if self.pattern is not None and columns % self.pattern[1]:
            raise ValueError(f"{self.structure} does not divide {columns} in-features")


def lowest(score: Tensor, sparsity: Sparsity, *, per_row: bool) -> Tensor:
    """The mask of the lowest scores [N, K]; of a tie, the first are dropped.

    ``per_row``: the same share in each row, else over the whole matrix.
    """
    if sparsity.pattern is not None:
        n, m = sparsity.pattern
        groups = score.unflatten(1, (-1, m))
        return _drop(groups, m - n).flatten(1)
    rows = score if per_row else score.reshape(1, -1)
    return _drop(rows, round(sparsity.share * rows.shape[-1])).view(score.shape)


def _drop(score: Tensor, count: int) -> Tensor:
    if count == 0:
        return torch.zeros(score.shape, dtype=torch.bool)
    bound = score.kthvalue(count, dim=-1, keepdim=True).values
    below, equal = score < bound, score == bound
    left = count - below.sum(dim=-1, keepdim=True)
    return below | (equal & (equal.cumsum(dim=-1) <= left))
