"""Native linear layers of int8 weights whose zeros are left out.

Shape letters: M rows, K in-features, N out-features, P panels of 32 out-features.
"""

import ctypes
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.formats.int_quantized import Int8Weight
from engine.kernels.cpu.library import Kernels, address, expands, kernels
from engine.kernels.cpu.linear import (
    PANEL,
    Int8Weights,
    PackedInt8Linear,
    int8_weights,
    multiply_int8,
    pack_int8,
    padded,
    panel_rows,
    whole_panels,
)
from engine.kernels.cpu.memory import aligned_empty

_LINE = 64
_MASK = 8
_BLOCK = 256 << 10  # kBlock of csrc/blocks.h


class KeptArgs(ctypes.Structure):
    """``KeptArgs`` of csrc/kept.cpp."""

    _fields_ = (
        ("whole", ctypes.c_void_p),
        ("records", ctypes.c_void_p),
        ("begins", ctypes.c_void_p),
        ("panels", ctypes.c_int64),
        ("quads", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True)
class PackedSparseLinear:
    """As ``PackedInt8Linear``, and bit-equal to it; only what is not 0 is in memory."""

    records: Tensor  # uint8, see csrc/lines.h
    begins: Tensor  # int64 [P + 1]
    scale_N: Tensor  # float32, padded to whole panels; so is the bias
    bias_N: Tensor | None
    outs: int
    columns: int
    kernels: Kernels
    weights: Int8Weights
    storage: str = "int8 sparse"
    execution: str = "int8 x int8"

    @classmethod
    def pack(
        cls,
        weight: Int8Weight,
        bias_N: Tensor | None = None,
        found: Kernels | None = None,
        *,
        native: bool = True,
    ) -> "PackedSparseLinear":
        """Packs a copy; ``weight`` may go. ``found`` None takes the best kernels.

        ``native`` False does not use the processor's instruction.
        """
        outs, columns = weight.q_NK.shape
        records, begins = _pack(pack_int8(weight.q_NK), padded(columns))
        scale_N = whole_panels(weight.scale_N)
        bias_N = None if bias_N is None else whole_panels(bias_N)
        weights = int8_weights(records, scale_N, bias_N, outs, columns)
        weights.begins, weights.expands = address(begins), native and expands()
        found = found or kernels()
        return cls(records, begins, scale_N, bias_N, outs, columns, found, weights)

    @property
    def product(self) -> str:
        """See ``Linear``."""
        return self.kernels.name

    @property
    def nbytes(self) -> int:
        """See ``Linear``."""
        bias = 0 if self.bias_N is None else self.bias_N.nbytes
        return self.records.nbytes + self.begins.nbytes + self.scale_N.nbytes + bias

    def __call__(self, x_MK: Tensor) -> Tensor:
        """See ``Linear``."""
        panel = PANEL * padded(self.columns)
        return multiply_int8(x_MK, self.weights, self.kernels, max(panel, _BLOCK))

    def rows(self, ids_T: Tensor) -> Int8Weight:
        """Rows of the weight by out-feature, unpacked: int8 [T, K] and scales [T]."""
        panels, places = (ids_T // PANEL).unique(return_inverse=True)
        whole = torch.cat([self._panels(int(panel), 1) for panel in panels])
        q_TK = panel_rows(whole, places * PANEL + ids_T % PANEL, padded(self.columns))
        return Int8Weight(q_TK[:, : self.columns], self.scale_N[ids_T])

    def dense(self) -> PackedInt8Linear:
        """The same layer with its zeros."""
        packed = self._panels(0, len(self.begins) - 1)
        parts = packed, self.scale_N, self.bias_N, self.outs, self.columns
        return PackedInt8Linear(*parts, self.kernels, int8_weights(*parts))

    def copy(self) -> "PackedSparseLinear":
        """The same in other memory."""
        records = aligned_empty(len(self.records)).copy_(self.records)
        weights = Int8Weights.from_buffer_copy(self.weights)
        weights.weights = address(records)
        return replace(self, records=records, weights=weights)

    def _panels(self, first: int, count: int) -> Tensor:
        """uint8, as ``pack_int8`` has it."""
        width = padded(self.columns)
        whole, begins = aligned_empty(count * PANEL * width), self.begins[first:]
        args = KeptArgs(address(whole), address(self.records), address(begins), count, width // 4)
        self.kernels.expand(ctypes.byref(args))
        return whole


def _pack(whole: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Records, and where each panel's begins, of whole panels of ``width`` columns."""
    panels, lines = len(whole) // (PANEL * width), len(whole) // _LINE
    records, begins = aligned_empty(lines * (_LINE + _MASK) + 1), torch.empty(panels + 1).long()
    args = KeptArgs(address(whole), address(records), address(begins), panels, width // 4)
    kernels().keep(ctypes.byref(args))
    kept = aligned_empty(int(begins[-1]) + _LINE).zero_()  # expanding reads a line's length beyond
    kept[:-_LINE] = records[: len(kept) - _LINE]
    return kept, begins
