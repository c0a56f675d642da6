"""Linear layers: what they store and what they compute, said separately.

Shape letters: M rows, K in-features, N out-features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from engine.formats.float_quantized import Float8Weight
from engine.formats.grouped import GroupedWeight
from engine.formats.int_quantized import Int8Weight
from engine.kernels import kernel
from engine.kernels.cpu.grouped import PackedGroupedLinear, per_channel, takes, whole_group
from engine.kernels.cpu.linear import PackedInt8Linear
from engine.kernels.cpu.sparse import PackedSparseLinear
from engine.kernels.torch_native import int8_product
from engine.layers.float8 import Float8Linear
from engine.layers.weight import SparseWeight, Weight, WeightOnly, joined, kind, out_features


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


def activations(linear: Linear) -> str:
    """What ``linear`` reads its input as: "int8", "float32", ..."""
    return linear.execution.rsplit(" ", 1)[-1]


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

    @property
    def columns(self) -> int:
        """K."""
        return self.q_NK.shape[1]

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
class Int4Linear:
    """4-bit weights in groups, a byte for each; activations become int8 per row.

    The bias is float32 and added to the scaled sums.
    """

    weight: GroupedWeight
    kernel: Callable[[Tensor, GroupedWeight], Tensor]
    bias_N: Tensor | None = None
    storage: str = "int4"
    execution: str = "int4 x int8"

    @property
    def product(self) -> str:
        """See ``Linear``."""
        return int8_product()

    @property
    def nbytes(self) -> int:
        """See ``Linear``."""
        weight = self.weight
        scales = weight.scale_NG.nbytes + _nbytes(weight.zero_NG)
        return weight.q_NK.nbytes + scales + _nbytes(self.bias_N)

    def __call__(self, x_MK: Tensor) -> Tensor:
        """See ``Linear``."""
        out_MN = self.kernel(x_MK, self.weight)
        return out_MN if self.bias_N is None else out_MN.add_(self.bias_N)


@dataclass(frozen=True, slots=True)
class Wrapped:
    """Another layer, which says what is stored and computed."""

    linear: Linear

    @property
    def storage(self) -> str:
        """See ``Linear``."""
        return self.linear.storage

    @property
    def execution(self) -> str:
        """See ``Linear``."""
        return self.linear.execution

    @property
    def product(self) -> str:
        """See ``Linear``."""
        return self.linear.product

    @property
    def nbytes(self) -> int:
        """See ``Linear``."""
        return self.linear.nbytes


@dataclass(frozen=True, slots=True)
class Reordered(Wrapped):
    """A linear layer whose in-features are those of the input in the order ``order_K``."""

    order_K: Tensor

    @property
    def nbytes(self) -> int:
        """See ``Linear``."""
        return self.linear.nbytes + self.order_K.nbytes

    def __call__(self, x_MK: Tensor) -> Tensor:
        """See ``Linear``."""
        return self.linear(x_MK[:, self.order_K])


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
    """The layer that executes ``weight`` as its type says; the bias is float32."""
    if isinstance(weight, WeightOnly):
        return _weight_only(weight, backend, bias_N)
    if isinstance(weight, GroupedWeight):
        if backend == "cpu" and takes(weight, "int8"):
            return PackedGroupedLinear.pack(weight, "int8", bias_N)
        run = kernel("int4_linear", backend)
        return Int4Linear(replace(weight, scale_NG=weight.scale_NG.float()), run, bias_N)
    if isinstance(weight, Int8Weight | SparseWeight):
        return _int8(weight, backend, bias_N)
    if isinstance(weight, Float8Weight):
        float8 = Float8Weight(weight.q_NK.contiguous(), weight.scale_N.float())
        return Float8Linear(float8, kernel("float8_linear", backend), bias_N)
    return DenseLinear(weight.float().contiguous(), kernel("dense_linear", backend), bias_N)


def _int8(weight: Int8Weight | SparseWeight, backend: str, bias_N: Tensor | None) -> Linear:
    whole = weight.weight if isinstance(weight, SparseWeight) else weight
    if backend == "cpu":
        packed = PackedSparseLinear if isinstance(weight, SparseWeight) else PackedInt8Linear
        return packed.pack(whole, bias_N)
    scale_N, run = whole.scale_N.float(), kernel("int8_linear", backend)
    return Int8Linear(whole.q_NK.contiguous(), scale_N, run, bias_N)


def _weight_only(weight: WeightOnly, backend: str, bias_N: Tensor | None) -> Linear:
    stored = weight.weight
    if weight.order_K is not None:
        return Reordered(_weight_only(WeightOnly(stored), backend, bias_N), weight.order_K)
    grouped = per_channel(stored) if isinstance(stored, Int8Weight) else whole_group(stored)
    if backend == "cpu" and takes(grouped, "float32"):
        return PackedGroupedLinear.pack(grouped, "float32", bias_N)
    run, storage = kernel("dense_linear", backend), f"int{weight.bits} unpacked to float32"
    return DenseLinear(stored.dequantize(), run, bias_N, storage)


def make_fused(weights: Sequence[Weight], backend: str, bias_N: Tensor | None = None) -> Linear:
    """One layer for several with the same input; their outputs, and biases, follow each other."""
    if not all(isinstance(weight, SparseWeight) for weight in weights):
        # One layer with zeros is faster than a sparse one and another.
        weights = [w.weight if isinstance(w, SparseWeight) else w for w in weights]
    if len({kind(weight) for weight in weights}) == 1:
        return make_linear(joined(weights), backend, bias_N)
    biases: Sequence[Tensor | None] = [None] * len(weights)
    if bias_N is not None:
        biases = bias_N.split([out_features(weight) for weight in weights])
    parts = zip(weights, biases, strict=True)
    return Split(tuple(make_linear(weight, backend, bias) for weight, bias in parts))


def _nbytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes
