"""FP8 linear layers. There is no fast kernel for them here: they are for evaluation."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from engine.formats.float_quantized import Float8Weight


@dataclass(frozen=True, slots=True)
class Float8Linear:
    """FP8 weights with a scale for each out-feature; activations become FP8 per row.

    The bias is float32 and added to the scaled sums.
    """

    weight: Float8Weight
    kernel: Callable[[Tensor, Float8Weight], Tensor]
    bias_N: Tensor | None = None
    storage: str = "float8_e4m3"
    execution: str = "float8_e4m3 x float8_e4m3"
    product: str = "reference (slow)"

    @property
    def nbytes(self) -> int:
        """See ``Linear``."""
        bias = 0 if self.bias_N is None else self.bias_N.nbytes
        return self.weight.q_NK.nbytes + self.weight.scale_N.nbytes + bias

    def __call__(self, x_MK: Tensor) -> Tensor:
        """See ``Linear``."""
        out_MN = self.kernel(x_MK, self.weight)
        return out_MN if self.bias_N is None else out_MN.add_(self.bias_N)
