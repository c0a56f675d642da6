"""compressed-tensors' ``pack-quantized``: integers of a few bits, packed into int32 words.

Tensors of a linear layer [N, K] with G groups in a row: ``weight_packed`` int32
[N, ceil(K * bits / 32)], ``weight_scale`` [N, G] in the model's dtype, ``weight_shape`` int64
(N, K), and where the grid is asymmetric ``weight_zero_point`` int32 [ceil(N * bits / 32), G].
A row is one little-endian stream of q + 2^(bits-1), least bit first; zero points are packed
along the out-features. Words of 3, 5, 6 or 7 bits changed their layout between releases of
compressed-tensors and are refused.
"""

import torch
from torch import Tensor

from engine.formats.grouped import GroupedWeight
from engine.formats.int_quantized import Int8Weight

FORMAT = "pack-quantized"
BITS = (4, 8)


def pack(weight: GroupedWeight | Int8Weight) -> dict[str, Tensor]:
    """The layer's tensors, by their names after the module's name."""
    bits = 8 if isinstance(weight, Int8Weight) else weight.bits
    return {
        "weight_packed": pack_rows(weight.q_NK, bits),
        "weight_shape": torch.tensor(weight.q_NK.shape, dtype=torch.int64),
        **pack_grid(weight),
    }


def unpack(tensors: dict[str, Tensor]) -> GroupedWeight | Int8Weight:
    """Inverse of ``pack``. Raises ``ValueError`` on other dtypes, shapes or bits."""
    packed = tensors["weight_packed"]
    rows, columns = (int(size) for size in tensors["weight_shape"])
    bits = packed_bits(tuple(packed.shape), columns)
    if packed.dtype != torch.int32 or packed.ndim != 2 or packed.shape[0] != rows:
        raise ValueError(f"weight_packed is {packed.dtype} {list(packed.shape)}")
    return unpack_grid(unpack_rows(packed, bits, columns), bits, tensors)


def pack_grid(weight: GroupedWeight | Int8Weight) -> dict[str, Tensor]:
    """Scales, and zero points where there are any."""
    if isinstance(weight, Int8Weight):
        return {"weight_scale": weight.scale_N[:, None].contiguous()}
    tensors = {"weight_scale": weight.scale_NG.contiguous()}
    if weight.zero_NG is not None:
        zero_GN = weight.zero_NG.t().contiguous()
        tensors["weight_zero_point"] = pack_rows(zero_GN, weight.bits).t().contiguous()
    return tensors


def unpack_grid(q_NK: Tensor, bits: int, tensors: dict[str, Tensor]) -> GroupedWeight | Int8Weight:
    """``q_NK`` on the grid that ``pack_grid`` gave. Raises ``ValueError``, as ``unpack`` does."""
    rows, columns = q_NK.shape
    scale_NG, zeros = tensors["weight_scale"], tensors.get("weight_zero_point")
    if not scale_NG.is_floating_point() or scale_NG.ndim != 2 or scale_NG.shape[0] != rows:
        raise ValueError(f"weight_scale must be floating [N, G], not {list(scale_NG.shape)}")
    groups = scale_NG.shape[1]
    if not groups or columns % groups:
        raise ValueError(f"{groups} groups do not divide {columns} in-features")
    if bits == 8 and groups == 1 and zeros is None:
        return Int8Weight(q_NK, scale_NG[:, 0])
    if zeros is None:
        return GroupedWeight(q_NK, scale_NG, bits=bits)
    if zeros.dtype != torch.int32 or zeros.shape != (-(-rows * bits // 32), groups):
        raise ValueError(f"weight_zero_point is {zeros.dtype} {list(zeros.shape)}")
    zero_GN = unpack_rows(zeros.t().contiguous(), bits, rows)
    return GroupedWeight(q_NK, scale_NG, zero_GN.t().contiguous(), bits=bits)


def packed_bits(shape: tuple[int, ...], columns: int) -> int:
    """4 or 8, from the shape of ``weight_packed``. Raises ``ValueError`` for any other."""
    for bits in BITS:
        if len(shape) == 2 and shape[1] == -(-columns * bits // 32):
            return bits
    raise ValueError(
        f"weight_packed {list(shape)} for {columns} in-features: packed weights of 4 and 8 bits "
        "are served, of 3, 5, 6 and 7 bits (whose layout changed in 2026) are not"
    )


def pack_rows(q_MK: Tensor, bits: int) -> Tensor:
    """int8 [M, K] of ``bits``-bit integers -> int32 [M, ceil(K * bits / 32)]; 4 or 8 bits.

    Words are little-endian, so that bytes are made and then read as words.
    """
    q_MK = q_MK.to(torch.int8)
    u_MK = q_MK.view(torch.uint8) ^ 128 if bits == 8 else (q_MK + (1 << bits - 1)).view(torch.uint8)
    u_MK = torch.nn.functional.pad(u_MK, (0, -u_MK.shape[1] % (32 // bits)))
    parts = u_MK.unflatten(1, (-1, 8 // bits)).unbind(2)
    # Made anew: rows of a transposed tensor, or a single row, have strides that words do not.
    bytes_MB = torch.zeros(parts[0].shape, dtype=torch.uint8)
    for place, part in enumerate(parts):
        bytes_MB |= part << (place * bits)
    words_MW: Tensor = bytes_MB.view(torch.int32)
    return words_MW


def unpack_rows(words_MW: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of ``pack_rows``: int8 [M, columns]."""
    bytes_MB = words_MW.new_empty(words_MW.shape).copy_(words_MW).view(torch.uint8)
    if bits == 8:
        return (bytes_MB[:, :columns] ^ 128).view(torch.int8).contiguous()
    mask = (1 << bits) - 1
    parts = [(bytes_MB >> shift) & mask for shift in range(0, 8, bits)]
    u_MK = torch.stack(parts, dim=2).flatten(1)[:, :columns].contiguous()
    return u_MK.view(torch.int8) - (1 << (bits - 1))


def config_group(
    targets: list[str], bits: int, group_size: int | None, *, symmetric: bool
) -> dict[str, object]:
    """This scheme as one of ``quantization_config``'s config_groups."""
    weights: dict[str, object] = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    weights |= {"strategy": "group" if group_size else "channel", "group_size": group_size}
    return {
        "targets": targets,
        "weights": {**weights, "dynamic": False, "observer": "minmax"},
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
    }
