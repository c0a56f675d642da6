"""Linear layers on native kernels: weights packed at load, activations quantised in the call.

Shape letters: M rows, K in-features, N out-features, P panels of 32 out-features.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.formats.int_quantized import Int8Weight
from engine.kernels.cpu.library import Kernels, address, kernels
from engine.kernels.cpu.memory import aligned_empty, scratch

PANEL = 32
_UNIT = 16  # columns are padded to a multiple of it


class Activations(ctypes.Structure):
    """``Activations`` of csrc/activations.h."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group", ctypes.c_int64),
    )


class Int8Weights(ctypes.Structure):
    """``Int8Weights`` of csrc/linear_int8.h."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outs", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("begins", ctypes.c_void_p),
        ("expands", ctypes.c_int64),
    )


class LinearInt8Args(ctypes.Structure):
    """``LinearInt8Args`` of csrc/linear_int8.cpp."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("activations", Activations),
        ("weights", Int8Weights),
        ("out", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True)
class PackedInt8Linear:
    """int8 weights with a scale for each out-feature; activations become int8 per row.

    Bit-equal to ``reference.int8_linear`` plus bias, whatever M, threads and instruction set.
    """

    packed: Tensor  # see pack_int8
    scale_N: Tensor  # float32, padded to whole panels; so is the bias
    bias_N: Tensor | None
    outs: int
    columns: int
    kernels: Kernels
    weights: Int8Weights
    storage: str = "int8"
    execution: str = "int8 x int8"

    @classmethod
    def pack(
        cls, weight: Int8Weight, bias_N: Tensor | None = None, found: Kernels | None = None
    ) -> "PackedInt8Linear":
        """Packs a copy; ``weight`` may go. ``found`` None takes the best kernels."""
        outs, columns = weight.q_NK.shape
        packed = pack_int8(weight.q_NK)
        scale_N = whole_panels(weight.scale_N)
        bias_N = None if bias_N is None else whole_panels(bias_N)
        weights = int8_weights(packed, scale_N, bias_N, outs, columns)
        return cls(packed, scale_N, bias_N, outs, columns, found or kernels(), weights)

    @property
    def product(self) -> str:
        """See ``Linear``."""
        return self.kernels.name

    @property
    def nbytes(self) -> int:
        """See ``Linear``."""
        bias = 0 if self.bias_N is None else self.bias_N.nbytes
        return self.packed.nbytes + self.scale_N.nbytes + bias

    def __call__(self, x_MK: Tensor) -> Tensor:
        """See ``Linear``."""
        return multiply_int8(x_MK, self.weights, self.kernels)

    def rows(self, ids_T: Tensor) -> Int8Weight:
        """Rows of the weight by out-feature, unpacked: int8 [T, K] and scales [T]."""
        q_TK = panel_rows(self.packed, ids_T, padded(self.columns))[:, : self.columns]
        return Int8Weight(q_TK, self.scale_N[ids_T])


def int8_linear(x_MK: Tensor, q_NK: Tensor, scale_N: Tensor) -> Tensor:
    """See ``reference.int8_linear``; packs the weight in the call."""
    return PackedInt8Linear.pack(Int8Weight(q_NK, scale_N))(x_MK)


def int8_weights(
    packed: Tensor, scale_N: Tensor, bias_N: Tensor | None, outs: int, columns: int
) -> Int8Weights:
    """For the kernels; holds addresses of the tensors, which must outlive it."""
    bias = None if bias_N is None else address(bias_N)
    return Int8Weights(address(packed), address(scale_N), bias, outs, columns)


def multiply_int8(x_MK: Tensor, weights: Int8Weights, found: Kernels, expanded: int = 0) -> Tensor:
    """float32 [M, N]; ``expanded``: ``expanded_bytes`` of csrc/linear_int8.h."""
    x_MK = x_MK.contiguous()
    M, K = x_MK.shape
    assert weights.columns == K
    assert x_MK.dtype == torch.float32
    out_MN = torch.empty(M, int(weights.outs))
    if M == 0:
        return out_MN
    threads = torch.get_num_threads()
    q, scale, sums, zeros = scratch(M * padded(K), 4 * M, 4 * M, threads * expanded)
    activations = Activations(q, scale, sums, M, K, 0)
    x, out = address(x_MK), address(out_MN)
    args = LinearInt8Args(x, activations, weights, out, zeros, threads)
    found.linear_int8(ctypes.byref(args))
    return out_MN


def panel_rows(packed: Tensor, ids_T: Tensor, width: int) -> Tensor:
    """int8 [T, width]: rows, by out-feature, of uint8 panels of ``width`` columns."""
    quads = packed.view(torch.int32).view(-1, width // 4, 2, 16)
    half, lane = ids_T // 16 % 2, ids_T % 16
    u_TK = quads[ids_T // PANEL, :, half, lane].view(torch.uint8)
    return (u_TK ^ 128).view(torch.int8)


def pack_int8(q_NK: Tensor) -> Tensor:
    """int8 [N, K] as panels: uint8 [P, K / 4, 2, 16, 4], flat, w + 128."""
    N, K = q_NK.shape
    padded_N, padded_K = -(-N // PANEL) * PANEL, padded(K)
    if (padded_N, padded_K) != (N, K):
        whole = q_NK.new_zeros(padded_N, padded_K)
        whole[:N, :K] = q_NK
        q_NK = whole
    quads = q_NK.contiguous().view(torch.int32).view(padded_N // PANEL, 2, 16, padded_K // 4)
    packed = aligned_empty(padded_N * padded_K)
    packed.view(torch.int32).view(-1, padded_K // 4, 2, 16).copy_(quads.permute(0, 3, 1, 2))
    return packed.bitwise_xor_(128)


def whole_panels(values_N: Tensor) -> Tensor:
    """float32 copy, padded with zeros."""
    count = len(values_N)
    padded_N = aligned_empty(4 * (-(-count // PANEL) * PANEL)).view(torch.float32).zero_()
    padded_N[:count] = values_N
    return padded_N


def padded(columns: int) -> int:
    """Columns as panels have them."""
    return -(-columns // _UNIT) * _UNIT
