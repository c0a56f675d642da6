"""Native linear layers of weights with a scale for each group: W4A8, W4A16 and W8A16.

Shape letters: M rows, K in-features, N out-features, G groups, P panels of 32 out-features.
"""

import ctypes
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from engine.formats.grouped import GroupedWeight
from engine.formats.int_quantized import Int8Weight
from engine.kernels.cpu.library import Kernels, address, kernels
from engine.kernels.cpu.linear import PANEL, Activations, whole_panels
from engine.kernels.cpu.memory import aligned_empty, scratch

# The order is that of ScaleType in csrc/grouped.h.
_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_GROUP_UNIT = 32


class GroupedWeights(ctypes.Structure):
    """``GroupedWeights`` of csrc/grouped.h."""

    _fields_ = (
        ("records", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outs", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("scale_type", ctypes.c_int64),
        ("has_zeros", ctypes.c_int64),
    )


class LinearInt4Args(ctypes.Structure):
    """``LinearInt4Args`` of csrc/linear_int4.cpp."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("activations", Activations),
        ("weights", GroupedWeights),
        ("out", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    )


class LinearFloatArgs(ctypes.Structure):
    """``LinearFloatArgs`` of csrc/linear_float.cpp."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("weights", GroupedWeights),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True)
class PackedGroupedLinear:
    """Weights of 4 or 8 bits in groups; activations become int8 per row, or stay float32.

    int8 activations (4 bits only): see ``reference.int4_linear``, bit-equal whatever M, threads
    and instruction set. float32 ones: see ``reference.weight_only_linear``, with products added
    in ascending order, which is the same for all of these too.
    """

    records: Tensor  # uint8 [P, G, bytes of a record], see csrc/grouped.h
    bias_N: Tensor | None  # float32, padded to whole panels
    activations: Literal["int8", "float32"]
    outs: int
    columns: int
    kernels: Kernels
    weights: GroupedWeights

    @classmethod
    def pack(
        cls,
        weight: GroupedWeight,
        activations: Literal["int8", "float32"],
        bias_N: Tensor | None = None,
        found: Kernels | None = None,
    ) -> "PackedGroupedLinear":
        """Packs a copy; ``weight`` may go. ``found`` None takes the best kernels.

        Raises ``ValueError`` for a weight that it does not take.
        """
        if not takes(weight, activations):
            raise ValueError(f"no kernel for {weight.bits} bits in groups of {weight.group}")
        outs, columns = weight.q_NK.shape
        scale_type = _scale_type(weight.scale_NG)
        records = _pack_records(weight, scale_type)
        bias_N = None if bias_N is None else whole_panels(bias_N)
        weights = GroupedWeights(
            address(records),
            None if bias_N is None else address(bias_N),
            outs,
            columns,
            weight.group,
            weight.bits,
            _SCALES.index(scale_type),
            weight.zero_NG is not None,
        )
        return cls(records, bias_N, activations, outs, columns, found or kernels(), weights)

    @property
    def storage(self) -> str:
        """See ``Linear``."""
        return f"int{self.weights.bits}"

    @property
    def execution(self) -> str:
        """See ``Linear``."""
        return f"{self.storage} x {self.activations}"

    @property
    def product(self) -> str:
        """See ``Linear``."""
        return self.kernels.name

    @property
    def nbytes(self) -> int:
        """See ``Linear``."""
        return self.records.nbytes + (0 if self.bias_N is None else self.bias_N.nbytes)

    def __call__(self, x_MK: Tensor) -> Tensor:
        """See ``Linear``."""
        x_MK = x_MK.contiguous()
        M, K = x_MK.shape
        assert self.columns == K
        assert x_MK.dtype == torch.float32
        out_MN = torch.empty(M, self.outs)
        if M == 0:
            return out_MN
        x, out, threads = address(x_MK), address(out_MN), torch.get_num_threads()
        if self.activations == "float32":
            args = LinearFloatArgs(x, self.weights, out, M, threads)
            self.kernels.linear_float(ctypes.byref(args))
            return out_MN
        groups, group = self.records.shape[1], int(self.weights.group)
        q, scale, sums = scratch(M * groups * group, 4 * M, 4 * M * groups)
        activations = Activations(q, scale, sums, M, K, group)
        self.kernels.linear_int4(
            ctypes.byref(LinearInt4Args(x, activations, self.weights, out, threads))
        )
        return out_MN

    def rows(self, ids_T: Tensor) -> GroupedWeight:
        """Rows of the weight by out-feature, unpacked."""
        w, records = self.weights, self.records[ids_T // PANEL]
        T = len(records)
        scale_type, lane = _SCALES[int(w.scale_type)], ids_T % PANEL
        begin = PANEL * scale_type.itemsize
        each = torch.arange(T)
        scale_TG = records[..., :begin].contiguous().view(scale_type)[each, :, lane]
        zero_TG, middle = None, 1 << int(w.bits) - 1
        if w.has_zeros:
            zeros = records[..., begin : begin + 2 * PANEL].contiguous().view(torch.int16)
            zero_TG, begin = (zeros[each, :, lane] - middle).to(torch.int8), begin + 2 * PANEL
        bytes_TG = records[..., begin:].unflatten(2, (-1, 2, 16, 4))
        u = bytes_TG[each, :, :, lane // 16, lane % 16]  # [T, G, 128 bytes' columns, 4]
        if w.bits == 4:
            u = torch.stack((u & 15, u >> 4), dim=3)
        u_TK = u.reshape(T, -1)[:, : self.columns]
        q_TK = (u_TK.to(torch.int16) - middle).to(torch.int8)
        return GroupedWeight(q_TK, scale_TG, zero_TG, int(w.group), int(w.bits))


def takes(weight: GroupedWeight, activations: Literal["int8", "float32"]) -> bool:
    """Groups must be multiples of 32; for int8 activations of 4 bits, and 128 at most."""
    fits = weight.group % _GROUP_UNIT == 0
    return fits and (activations == "float32" or (weight.bits == 4 and weight.group <= 128))


def per_channel(weight: Int8Weight) -> GroupedWeight:
    """One group: for float activations."""
    return whole_group(GroupedWeight(weight.q_NK, weight.scale_N[:, None], bits=8))


def whole_group(weight: GroupedWeight) -> GroupedWeight:
    """A single group as long as ``takes`` wants it: its padding is never read."""
    if weight.scale_NG.shape[1] > 1:
        return weight
    K = weight.q_NK.shape[1]
    return replace(weight, group=-(-K // _GROUP_UNIT) * _GROUP_UNIT)


def _scale_type(scale_NG: Tensor) -> torch.dtype:
    """The smallest dtype that holds all of the scales exactly."""
    exact = scale_NG.float()
    return next(dtype for dtype in _SCALES if torch.equal(exact.to(dtype).float(), exact))


def _pack_records(weight: GroupedWeight, scale_type: torch.dtype) -> Tensor:
    N, K = weight.q_NK.shape
    panels, groups = -(-N // PANEL), weight.scale_NG.shape[1]
    middle = 1 << weight.bits - 1
    u_NK = torch.zeros(panels * PANEL, groups * weight.group, dtype=torch.uint8)
    # The addition wraps around, as it has to for 8 bits.
    u_NK[:N, :K] = weight.q_NK.view(torch.uint8) + middle
    parts = [_by_panel(weight.scale_NG.to(scale_type), panels)]
    if weight.zero_NG is not None:
        parts.append(_by_panel(weight.zero_NG.to(torch.int16) + middle, panels))
    # [P, half, lane, G, quads of columns]
    quads = u_NK.view(torch.int32).view(panels, 2, 16, groups, -1)
    if weight.bits == 4:
        quads = quads[..., ::2] | quads[..., 1::2] << 4
    ordered = quads.permute(0, 3, 4, 1, 2).contiguous()
    parts.append(ordered.view(torch.uint8).view(panels, groups, -1))
    width = sum(part.shape[2] for part in parts)
    records = aligned_empty(panels * groups * width).view(panels, groups, width)
    return torch.cat(parts, 2, out=records)


def _by_panel(values_NG: Tensor, panels: int) -> Tensor:
    """The bytes of 32 out-features' values for each panel and group: uint8 [P, G, bytes]."""
    N, groups = values_NG.shape
    whole = values_NG.new_zeros(panels * PANEL, groups)
    whole[:N] = values_NG
    return whole.view(panels, PANEL, groups).transpose(1, 2).contiguous().view(torch.uint8)
