"""Linear layers: what they store and what they compute, said separately.

Shape letters: M rows, K in-features, N out-features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.formats.int_quantized import Int8Weight
from engine.formats.pack_quantized import Int4Weight
from engine.kernels import kernel


@dataclass(frozen=True, slots=True)
class Unpacked:
    """float32 [N, K] made of quantised weights, for float activations; ``bits`` as ``int4``."""

    weight_NK: Tensor
    bits: str


# A weight as it will be executed: floating point [N, K], or quantised.
Weight = Tensor | Int8Weight | Int4Weight | Unpacked


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
    def nbytes(self) -> int:
        """See ``Linear``."""
        return self.q_NK.nbytes + self.scale_N.nbytes + _nbytes(self.bias_N)

    def __call__(self, x_MK: Tensor) -> Tensor:
        """See ``Linear``."""
        out_MN = self.kernel(x_MK, self.q_NK, self.scale_N)
        return out_MN if self.bias_N is None else out_MN.add_(self.bias_N)


@dataclass(frozen=True, slots=True)
class Int4Linear:
    """4-bit weights in groups, a byte for each; activations become int8 per row.

    The bias is float32 and added to the scaled sums.
    """

    q_NK: Tensor
    scale_NG: Tensor
    zero_NG: Tensor | None
    kernel: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    bias_N: Tensor | None = None
    storage: str = "int4"
    execution: str = "int4 x int8"

    @property
    def nbytes(self) -> int:
        """See ``Linear``."""
        scales = self.scale_NG.nbytes + _nbytes(self.zero_NG)
        return self.q_NK.nbytes + scales + _nbytes(self.bias_N)

    def __call__(self, x_MK: Tensor) -> Tensor:
        """See ``Linear``."""
        out_MN = self.kernel(x_MK, self.q_NK, self.scale_NG, self.zero_NG)
        return out_MN if self.bias_N is None else out_MN.add_(self.bias_N)


@dataclass(frozen=True, slots=True)
class Split:
    """Linear layers with the same input whose schemes differ: run one by one."""

    parts: tuple[Linear, ...]
    storage: str = "mixed"
    execution: str = "mixed"

    @property
    def nbytes(self) -> int:
        """See ``Linear``."""
        return sum(part.nbytes for part in self.parts)

    def __call__(self, x_MK: Tensor) -> Tensor:
        """See ``Linear``."""
        return torch.cat([part(x_MK) for part in self.parts], dim=1)


def make_linear(weight: Weight, backend: str, bias_N: Tensor | None = None) -> Linear:
    """The layer that executes ``weight`` as its storage says; the bias is float32."""
    if isinstance(weight, Int8Weight):
        scale_N, run = weight.scale_N.float(), kernel("int8_linear", backend)
        return Int8Linear(weight.q_NK.contiguous(), scale_N, run, bias_N)
    if isinstance(weight, Int4Weight):
        scale_NG, run = weight.scale_NG.float().contiguous(), kernel("int4_linear", backend)
        return Int4Linear(weight.q_NK.contiguous(), scale_NG, weight.zero_NG, run, bias_N)
    dense = kernel("dense_linear", backend)
    if isinstance(weight, Unpacked):
        return DenseLinear(weight.weight_NK, dense, bias_N, f"{weight.bits} unpacked to float32")
    return DenseLinear(weight.float().contiguous(), dense, bias_N)


def make_fused(weights: Sequence[Weight], backend: str, bias_N: Tensor | None = None) -> Linear:
    """One layer for several with the same input; their outputs, and biases, follow each other."""
    if len({_kind(weight) for weight in weights}) == 1:
        return make_linear(_joined(weights), backend, bias_N)
    biases: Sequence[Tensor | None] = [None] * len(weights)
    if bias_N is not None:
        biases = bias_N.split([out_features(weight) for weight in weights])
    parts = zip(weights, biases, strict=True)
    return Split(tuple(make_linear(weight, backend, bias) for weight, bias in parts))


def out_features(weight: Weight) -> int:
    """N of a weight [N, K]."""
    return _leading(weight).shape[0]


def take_rows(weight: Weight, order_N: Tensor) -> Weight:
    """The out-features ``order_N`` of a weight."""
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.q_NK[order_N], weight.scale_N[order_N])
    if isinstance(weight, Int4Weight):
        zero_NG = None if weight.zero_NG is None else weight.zero_NG[order_N]
        return Int4Weight(weight.q_NK[order_N], weight.scale_NG[order_N], zero_NG)
    if isinstance(weight, Unpacked):
        return Unpacked(weight.weight_NK[order_N], weight.bits)
    return weight[order_N]


def _leading(weight: Weight) -> Tensor:
    if isinstance(weight, Unpacked):
        return weight.weight_NK
    return weight if isinstance(weight, Tensor) else weight.q_NK


def _kind(weight: Weight) -> tuple[object, ...]:
    """Weights of one kind can be one layer."""
    if isinstance(weight, Int4Weight):
        return (Int4Weight, weight.scale_NG.shape[1], weight.zero_NG is None)
    if isinstance(weight, Unpacked):
        return (Unpacked, weight.bits)
    return (Int8Weight if isinstance(weight, Int8Weight) else Tensor,)


def _joined(weights: Sequence[Weight]) -> Weight:
    if len(weights) == 1:
        return weights[0]
    int8 = [weight for weight in weights if isinstance(weight, Int8Weight)]
    if int8:
        scales = [weight.scale_N.float() for weight in int8]
        return Int8Weight(torch.cat([weight.q_NK for weight in int8]), torch.cat(scales))
    int4 = [weight for weight in weights if isinstance(weight, Int4Weight)]
    if int4:
        zeros = [weight.zero_NG for weight in int4 if weight.zero_NG is not None]
        q_NK = torch.cat([weight.q_NK for weight in int4])
        scale_NG = torch.cat([weight.scale_NG.float() for weight in int4])
        return Int4Weight(q_NK, scale_NG, torch.cat(zeros) if zeros else None)
    unpacked = [weight for weight in weights if isinstance(weight, Unpacked)]
    if unpacked:
        return Unpacked(torch.cat([weight.weight_NK for weight in unpacked]), unpacked[0].bits)
    return torch.cat([weight.float() for weight in weights if isinstance(weight, Tensor)])


def quantize_int8(weight_NK: Tensor) -> Int8Weight:
    """Round to nearest, symmetric per out-feature: for a head that is quantised at load.

    Scale = absmax / 127.5 and the range [-128, 127], as compressed-tensors has it.
    """
    absmax_N = weight_NK.float().abs().amax(1)
    scale_N = torch.where(absmax_N > 0, absmax_N / 127.5, 1.0)
    q_NK = (weight_NK.float() / scale_N[:, None]).round_().clamp_(-128, 127)
    return Int8Weight(q_NK.to(torch.int8), scale_N)


def _nbytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes
