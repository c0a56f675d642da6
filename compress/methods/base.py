"""What a method is: a pure function from a layer's weight to its compressed form."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.formats.int_quantized import Int8Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerResult:
    """A compressed layer and what that cost.

    ``relative_error`` is |W - W'| / |W| in the Frobenius norm (0 for a zero weight);
    ``clipped_share`` the share of weights whose nearest grid point lay outside the grid;
    ``nbytes`` the size of the packed tensors.
    """

    weight: Int8Weight
    relative_error: float
    clipped_share: float
    nbytes: int
    seconds: float


class Method(Protocol):
    """Knows the mathematics and no model; a frozen dataclass of its hyper-parameters."""

    def apply(self, weight_NK: Tensor) -> LayerResult:
        """Compresses one weight: [N, K], bf16, fp16 or fp32, all finite; left as it is."""
        ...
