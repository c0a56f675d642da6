"""Linear layers: what they store and what they compute, said separately.

Shape letters: M rows, K in-features, N out-features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.formats.int_quantized import Int8Weight
from engine.kernels import kernel
from engine.kernels.cpu.linear import PackedInt8Linear
from engine.kernels.torch_native import int8_product

# A weight as it lies in the checkpoint: floating point [N, K], or quantised.
Weight = Tensor | Int8Weight


class Linear(Protocol):
    """x [M, K] -> float32 [M, N]."""

    @property
    def storage(self) -> str:
        """What is in memory."""
        ...

    @property
    def execution(self) -> str:
        """What the kernel multiplies."""
        ...

    @property
    def product(self) -> str:
        """Name of what multiplies, with a fallback that the processor makes necessary."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        ...

    def __call__(self, x_MK: Tensor) -> Tensor:
        """Runs the layer."""
        ...


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """float32 weights."""

    weight_NK: Tensor
    kernel: Callable[[Tensor, Tensor], Tensor]
    bias_N: Tensor | None = None
    storage: str = "float32"
    execution: str = "float32 x float32"
    product: str = "torch.linear"

    @property
    def nbytes(self) -> int:
        """See ``Linear``."""
        return self.weight_NK.nbytes + _nbytes(self.bias_N)

    def __call__(self, x_MK: Tensor) -> Tensor:
        """See ``Linear``."""
        out_MN = self.kernel(x_MK, self.weight_NK)
        return out_MN if self.bias_N is None else out_MN.add_(self.bias_N)


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """int8 weights with a scale for each out-feature; activations become int8 per row.

    The bias is float32 and added to the scaled sums.
    """

    q_NK: Tensor
    scale_N: Tensor
    kernel: Callable[[Tensor, Tensor, Tensor], Tensor]
    bias_N: Tensor | None = None
    storage: str = "int8"
    execution: str = "int8 x int8"

    @property
    def product(self) -> str:
        """See ``Linear``."""
        return int8_product()

    @property
    def outs(self) -> int:
        """N."""
        return len(self.scale_N)

    def rows(self, ids_T: Tensor) -> Int8Weight:
        """Rows of the weight, by out-feature."""
        return Int8Weight(self.q_NK[ids_T], self.scale_N[ids_T])

    @property
    def nbytes(self) -> int:
        """See ``Linear``."""
        return self.q_NK.nbytes + self.scale_N.nbytes + _nbytes(self.bias_N)

    def __call__(self, x_MK: Tensor) -> Tensor:
        """See ``Linear``."""
        out_MN = self.kernel(x_MK, self.q_NK, self.scale_N)
        return out_MN if self.bias_N is None else out_MN.add_(self.bias_N)


@dataclass(frozen=True, slots=True)
class Split:
    """Linear layers with the same input whose schemes differ: run one by one."""

    parts: tuple[Linear, ...]
    storage: str = "mixed"
    execution: str = "mixed"
    product: str = "mixed"

    @property
    def nbytes(self) -> int:
        """See ``Linear``."""
        return sum(part.nbytes for part in self.parts)

    def __call__(self, x_MK: Tensor) -> Tensor:
        """See ``Linear``."""
        return torch.cat([part(x_MK) for part in self.parts], dim=1)


def make_linear(weight: Weight, backend: str, bias_N: Tensor | None = None) -> Linear:
    """The layer that executes ``weight`` as its storage says; the bias is float32."""
    if isinstance(weight, Int8Weight) and backend == "cpu":
        return PackedInt8Linear.pack(weight, bias_N)
    if isinstance(weight, Int8Weight):
        scale_N, run = weight.scale_N.float(), kernel("int8_linear", backend)
        return Int8Linear(weight.q_NK.contiguous(), scale_N, run, bias_N)
    return DenseLinear(weight.float().contiguous(), kernel("dense_linear", backend), bias_N)


def make_fused(weights: Sequence[Weight], backend: str, bias_N: Tensor | None = None) -> Linear:
    """One layer for several with the same input; their outputs, and biases, follow each other."""
    if all(isinstance(weight, Int8Weight) for weight in weights):
        quantised = [weight for weight in weights if isinstance(weight, Int8Weight)]
        q_NK = torch.cat([weight.q_NK for weight in quantised])
        scale_N = torch.cat([weight.scale_N.float() for weight in quantised])
        return make_linear(Int8Weight(q_NK, scale_N), backend, bias_N)
    if not any(isinstance(weight, Int8Weight) for weight in weights):
        dense = [weight.float() for weight in weights if isinstance(weight, Tensor)]
        return make_linear(torch.cat(dense), backend, bias_N)
    biases: Sequence[Tensor | None] = [None] * len(weights)
    if bias_N is not None:
        biases = bias_N.split([out_features(weight) for weight in weights])
    parts = zip(weights, biases, strict=True)
    return Split(tuple(make_linear(weight, backend, bias) for weight, bias in parts))


def footprint(weight: Weight) -> tuple[str, str, int]:
    """Storage, execution and bytes of a weight's layer, known without making it."""
    if isinstance(weight, Int8Weight):
        return "int8", "int8 x int8", weight.q_NK.nbytes + 4 * len(weight.scale_N)
    return "float32", "float32 x float32", 4 * weight.numel()


def out_features(weight: Weight) -> int:
    """N of a weight [N, K]."""
    return (weight.q_NK if isinstance(weight, Int8Weight) else weight).shape[0]


def quantize_int8(weight_NK: Tensor) -> Int8Weight:
    """Round to nearest, symmetric per out-feature: for a head that is quantised at load.

    Scale = absmax / 127.5 and the range [-128, 127], as compressed-tensors has it.
    """
    absmax_N = weight_NK.float().abs().amax(1)
    scale_N = torch.where(absmax_N > 0, absmax_N / 127.5, 1.0)
    q_NK = (weight_NK.float() / scale_N[:, None]).round_().clamp_(-128, 127)
    return Int8Weight(q_NK.to(torch.int8), scale_N)


def _nbytes(bias_N: Tensor | None) -> int:
    return 0 if bias_N is None else bias_N.nbytes
