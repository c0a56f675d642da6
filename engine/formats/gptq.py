"""GPTQ's checkpoints, ``checkpoint_format`` ``gptq`` (v1) and ``gptq_v2``, of 4 and 8 bits.

Tensors of a linear layer [N, K] with G groups: ``qweight`` int32 [K * bits / 32, N], packed
along the in-features, ``qzeros`` int32 [G, N * bits / 32], packed along the out-features,
``scales`` [G, N], and mostly ``g_idx`` int32 [K], the group of each in-feature, which is
k // group unless the features were rounded in the order of their activations (``desc_act``).
weight = (u - zero) * scale with u and zero in [0, 2^bits - 1]. v1 stores zero - 1, and so wraps
around for a zero of 0.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import ModelLoadError
from engine.formats import REMEDY
from engine.formats.grouped import GroupedWeight, by_group
from engine.formats.pack_quantized import pack_rows, unpack_rows

METHOD = "gptq"
_VERSIONS = {"gptq": 1, "gptq_v2": 2}
_BITS = (4, 8)


@dataclass(frozen=True, slots=True)
class GptqScheme:
    """What the configuration says of all layers; ``group_size`` None: one group."""

    bits: int
    group_size: int | None
    symmetric: bool
    version: int

    @property
    def format(self) -> str:
        """As it is called in ``checkpoint_format``."""
        return next(name for name, version in _VERSIONS.items() if version == self.version)

    def unpack(
        self, tensors: dict[str, Tensor], columns: int
    ) -> tuple[GroupedWeight, Tensor | None]:
        """See ``unpack``; raises ``ValueError`` also where tensors and scheme do not agree."""
        weight, order_K = unpack(tensors, columns, self.group_size, version=self.version)
        if weight.bits != self.bits:
            raise ValueError(f"qweight has {weight.bits} bits, the configuration {self.bits}")
        if self.symmetric and weight.zero_NG is not None:
            raise ValueError(
                "sym is true, but zero points are not in the middle: "
                f"the tensors are not of checkpoint_format {self.format}"
            )
        return weight, order_K


def read_scheme(config: dict[str, Any]) -> GptqScheme:
    """From ``quantization_config``. Raises ``ModelLoadError`` for what is not served."""
    bits = config.get("bits")
    if bits not in _BITS:
        raise ModelLoadError(f"GPTQ of {bits!r} bits is not served, of 4 and 8 is: {REMEDY}")
    layout = config.get("checkpoint_format") or config.get("format") or "gptq"
    if config.get("is_marlin_format"):
        layout = "marlin"
    if layout not in _VERSIONS:
        raise ModelLoadError(
            f"GPTQ checkpoint_format {layout!r} is not served, gptq and gptq_v2 are: {REMEDY}"
        )
    if (dtype := config.get("pack_dtype", "int32")) != "int32":
        raise ModelLoadError(f"GPTQ packed into {dtype} is not served, into int32 is: {REMEDY}")
    dynamic = config.get("dynamic") or {}
    if any(not str(pattern).startswith("-") for pattern in dynamic):
        raise ModelLoadError(f"GPTQ with dynamic settings for some layers is not served: {REMEDY}")
    for key in ("lm_head", "adapter", "rotation"):
        if config.get(key):
            raise ModelLoadError(f"GPTQ with {key} is not served: {REMEDY}")
    group_size = read_group_size("GPTQ", config)
    return GptqScheme(bits, group_size, bool(config.get("sym", False)), _VERSIONS[layout])


def read_group_size(method: str, config: dict[str, Any]) -> int | None:
    """None for -1. Raises ``ModelLoadError`` where it is no size."""
    size = config.get("group_size")
    if type(size) is not int or (size < 1 and size != -1):
        raise ModelLoadError(f"{method}: group_size {size!r} is neither -1 nor a number of columns")
    return None if size == -1 else size


def check_groups(found: int, columns: int, group_size: int | None) -> None:
    """Raises ``ValueError`` unless ``group_size`` gives as many groups as there are scales."""
    wanted = -(-columns // (group_size or columns))
    if wanted != found:
        raise ValueError(f"scales have {found} groups, group_size {group_size} needs {wanted}")


def pack(
    weight: GroupedWeight, order_K: Tensor | None = None, *, version: int = 2
) -> dict[str, Tensor]:
    """The layer's tensors, by their names after the module's name.

    ``order_K``: see ``unpack``. Raises ``ValueError`` where v1 cannot hold a zero point.
    """
    bits, (_, columns) = weight.bits, weight.q_NK.shape
    g_idx_K, q_NK = torch.arange(columns) // weight.group, weight.q_NK
    if order_K is not None:
        place_K = order_K.argsort()
        g_idx_K, q_NK = g_idx_K[place_K], q_NK[:, place_K]
    zero_NG = weight.zero_NG
    if zero_NG is None:
        zero_NG = torch.zeros(weight.scale_NG.shape, dtype=torch.int8)
    stored_NG = zero_NG.to(torch.int16) - (2 - version)
    if bool((stored_NG < -(1 << (bits - 1))).any()):
        raise ValueError("v1 has no zero point of 0: write gptq_v2")
    return {
        "qweight": pack_rows(q_NK, bits).t().contiguous(),
        "qzeros": pack_rows(stored_NG.t(), bits),
        "scales": weight.scale_NG.t().contiguous(),
        "g_idx": g_idx_K.to(torch.int32),
    }


def unpack(
    tensors: dict[str, Tensor], columns: int, group_size: int | None, *, version: int
) -> tuple[GroupedWeight, Tensor | None]:
    """Inverse of ``pack`` for a layer of ``columns`` in-features.

    Second is ``order_K``, None where columns lie in their groups' order: the weight's columns
    are then those of the layer in this order.

    Raises:
        ValueError: other dtypes or shapes, or values that make no sense.
    """
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    bits = _bits(qweight, columns)
    if not scales.is_floating_point() or scales.ndim != 2 or scales.shape[1] != qweight.shape[1]:
        raise ValueError(f"scales must be floating [G, N], not {list(scales.shape)}")
    groups, outs = scales.shape
    if qzeros.dtype != torch.int32 or qzeros.shape != (groups, -(-outs * bits // 32)):
        raise ValueError(f"qzeros is {qzeros.dtype} {list(qzeros.shape)}")
    check_groups(groups, columns, group_size)
    group, order_K = group_size or columns, None
    if (g_idx_K := tensors.get("g_idx")) is not None:
        if g_idx_K.is_floating_point() or g_idx_K.shape != (columns,):
            raise ValueError(f"g_idx is {g_idx_K.dtype} {list(g_idx_K.shape)}")
        order_K = by_group(g_idx_K, group)
    q_NK = unpack_rows(qweight.t().contiguous(), bits, columns)
    half, mask = 1 << (bits - 1), (1 << bits) - 1
    stored_NG = unpack_rows(qzeros, bits, outs).t().to(torch.int16) + half
    zero_NG = (((stored_NG + (2 - version)) & mask) - half).to(torch.int8).contiguous()
    weight = GroupedWeight(
        q_NK if order_K is None else q_NK[:, order_K],
        scales.t().contiguous(),
        zero_NG if bool(zero_NG.any()) else None,
        group,
        bits,
    )
    return weight, order_K


def _bits(qweight: Tensor, columns: int) -> int:
    for bits in _BITS:
        if qweight.ndim == 2 and 32 * qweight.shape[0] == columns * bits:
            break
    else:
        raise ValueError(f"qweight {list(qweight.shape)} is not of 4 or 8 bits for {columns} rows")
    if qweight.dtype != torch.int32:
        raise ValueError(f"qweight is {qweight.dtype}")
    return bits
