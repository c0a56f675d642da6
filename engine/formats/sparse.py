"""Our extension of compressed-tensors: a bit mask and the kept values of a quantised weight.

Tensors of a linear layer [N, K] (docs/sparse-format.md has them bit by bit):

- ``weight_bitmask`` uint8 [N, ceil(K / 8)]: bit k % 8 of byte k // 8 is set where a value is kept
- ``weight_values``: kept values in row-major order. int8 where the weight without zeros left out
  would be int-quantized; uint8 where it would be pack-quantized: q + 2^(bits-1), of 4 bits two in
  a byte, the first in its low half
- ``weight_row_offsets`` int64 [N + 1]: the values before each row, for ``unstructured``;
  for ``2:4`` there are none: values are [N, K / 2], or [N, K / 4] bytes of 4 bits
- ``weight_shape`` int64 (N, K, bits), ``weight_scale`` and ``weight_zero_point`` as in the format
  without zeros left out

A value that is not kept is 0, or its group's zero point.
"""

from typing import Literal

import torch
from torch import Tensor

from engine.formats import int_quantized, pack_quantized
from engine.formats.grouped import GroupedWeight
from engine.formats.int_quantized import Int8Weight

Structure = Literal["unstructured", "2:4"]
STRUCTURES: tuple[Structure, ...] = ("unstructured", "2:4")
# Name in config.json -> the format whose zeros are left out. Others do not know these names.
FORMATS = {f"venturi-sparse-{kind}": kind for kind in (int_quantized.FORMAT, pack_quantized.FORMAT)}
SUFFIXES = (
    "weight_bitmask", "weight_values", "weight_row_offsets", "weight_shape", "weight_scale",
    "weight_zero_point",
)  # fmt: skip


def pack(
    weight: Int8Weight | GroupedWeight, structure: Structure, *, packed: bool
) -> dict[str, Tensor]:
    """The layer's tensors, by their names after the module's name.

    ``packed``: as pack-quantized. Raises ``ValueError`` where the weight is not so sparse as
    2:4 asks.
    """
    bits = 8 if isinstance(weight, Int8Weight) else weight.bits
    assert packed or bits == 8
    shape = weight.q_NK.shape
    keep_NK = weight.q_NK != _left_out(weight)
    if structure == "2:4":
        keep_NK = _two_of_four(keep_NK)
    values = weight.q_NK[keep_NK]
    if packed:
        values = _to_bytes(values, bits)
    tensors = {"weight_bitmask": _to_bits(keep_NK), "weight_values": values}
    if structure == "2:4":
        tensors["weight_values"] = values.view(shape[0], -1)
    else:
        tensors["weight_row_offsets"] = _row_offsets(keep_NK)
    tensors["weight_shape"] = torch.tensor([*shape, bits], dtype=torch.int64)
    return tensors | pack_quantized.pack_grid(weight)


def unpack(tensors: dict[str, Tensor]) -> Int8Weight | GroupedWeight:
    """Inverse of ``pack``. Raises ``ValueError`` where the tensors do not belong together."""
    rows, columns, bits = _shape(tensors["weight_shape"])
    keep_NK = _from_bits(tensors["weight_bitmask"], rows, columns)
    begins, offsets = _row_offsets(keep_NK), tensors.get("weight_row_offsets")
    kept = int(begins[-1])
    if offsets is None:
        if columns % 4 or bool((_count(keep_NK.unflatten(1, (-1, 4))) != 2).any()):
            raise ValueError("weight_bitmask does not keep two of four")
        wanted: tuple[int, ...] = (rows, kept * bits // 8 // rows)
    else:
        if offsets.dtype != torch.int64 or not torch.equal(offsets, begins):
            raise ValueError("weight_row_offsets are not the sums of weight_bitmask")
        wanted = (-(-kept * bits // 8),)
    values = tensors["weight_values"]
    if tuple(values.shape) != wanted:
        raise ValueError(f"weight_values are {list(values.shape)}, not {list(wanted)}")
    values = _from_bytes(values.flatten(), bits, kept)
    q_NK = torch.zeros(rows, columns, dtype=torch.int8)
    weight = pack_quantized.unpack_grid(q_NK, bits, tensors)
    if bits == 8 and isinstance(weight, GroupedWeight):
        raise ValueError("8 bits in groups, or with zero points, are not served without zeros")
    weight.q_NK.copy_(_left_out(weight))
    weight.q_NK.masked_scatter_(keep_NK, values)
    return weight


def is_packed(tensors: dict[str, Tensor]) -> bool:
    """Whether the weight would be pack-quantized, else it would be int-quantized."""
    return tensors["weight_values"].dtype == torch.uint8


def config_group(dense: dict[str, object], structure: Structure) -> dict[str, object]:
    """A config group of the format whose zeros are left out, as one of ours."""
    name = next(name for name, kind in FORMATS.items() if kind == dense["format"])
    return {**dense, "format": name, "sparsity": structure}


def dense_group(group: dict[str, object]) -> dict[str, object]:
    """Inverse of ``config_group``; groups of other formats stay as they are."""
    kind = FORMATS.get(str(group["format"]))
    if kind is None:
        return group
    rest = {name: value for name, value in group.items() if name != "sparsity"}
    return rest | {"format": kind}


def _left_out(weight: Int8Weight | GroupedWeight) -> Tensor:
    """int8, of q's shape or one number: what is not kept."""
    if isinstance(weight, Int8Weight) or weight.zero_NG is None:
        return torch.zeros((), dtype=torch.int8)
    return weight.zero_NG.repeat_interleave(weight.group, 1)[:, : weight.q_NK.shape[1]]


def _two_of_four(keep_NK: Tensor) -> Tensor:
    """Exactly two of each four: where less is needed, the first of those that are not."""
    if keep_NK.shape[1] % 4:
        raise ValueError(f"2:4 does not divide {keep_NK.shape[1]} in-features")
    keep = keep_NK.unflatten(1, (-1, 4))
    missing = 2 - _count(keep)[..., None]
    if bool((missing < 0).any()):
        raise ValueError("more than two of four are not 0")
    filled: Tensor = keep | ((~keep).cumsum(2) <= missing)
    return filled.flatten(1)


def _count(keep: Tensor) -> Tensor:
    """int32: along the last dimension."""
    counts: Tensor = keep.contiguous().view(torch.uint8).sum(-1, dtype=torch.int32)
    return counts


def _row_offsets(keep_NK: Tensor) -> Tensor:
    """int64 [N + 1]."""
    counts_N = _count(keep_NK).long()
    return torch.cat([counts_N.new_zeros(1), counts_N.cumsum(0)])


def _to_bits(mask_NK: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(mask_NK.to(torch.uint8), (0, -mask_NK.shape[1] % 8))
    places = torch.arange(8, dtype=torch.uint8)
    bits_NB: Tensor = (padded.unflatten(1, (-1, 8)) << places).sum(2, dtype=torch.uint8)
    return bits_NB


def _from_bits(bits_NB: Tensor, rows: int, columns: int) -> Tensor:
    if bits_NB.dtype != torch.uint8 or bits_NB.shape != (rows, -(-columns // 8)):
        raise ValueError(f"weight_bitmask is {bits_NB.dtype} {list(bits_NB.shape)}")
    mask: Tensor = (bits_NB[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1).bool()
    if bool(mask[:, columns:].any()):
        raise ValueError("weight_bitmask has bits after the last column")
    return mask[:, :columns]


def _to_bytes(values: Tensor, bits: int) -> Tensor:
    u = (values.to(torch.int16) + (1 << bits - 1)).to(torch.uint8)
    if bits == 8:
        return u
    low, high = torch.nn.functional.pad(u, (0, len(u) % 2)).view(-1, 2).unbind(1)
    return low | high << 4


def _from_bytes(values: Tensor, bits: int, count: int) -> Tensor:
    if values.dtype == torch.int8 and bits == 8:
        return values
    if values.dtype != torch.uint8:
        raise ValueError(f"weight_values are {values.dtype} for {bits} bits")
    if bits == 4:
        values = torch.stack((values & 15, values >> 4), 1).flatten()
        if bool(values[count:].any()):
            raise ValueError("weight_values have a value after the last one")
    return (values[:count].to(torch.int16) - (1 << bits - 1)).to(torch.int8)


def _shape(shape: Tensor) -> tuple[int, int, int]:
    if shape.dtype != torch.int64 or shape.shape != (3,):
        raise ValueError(f"weight_shape is {shape.dtype} {list(shape.shape)}")
    rows, columns, bits = (int(size) for size in shape)
    if rows < 1 or columns < 1 or bits not in pack_quantized.BITS:
        raise ValueError(f"weight_shape is {[rows, columns, bits]}")
    return rows, columns, bits
