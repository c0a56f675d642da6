"""AWQ's checkpoints of ``version`` ``gemm``: 4 bits in groups, with zero points.

Tensors of a linear layer [N, K] with G groups: ``qweight`` int32 [K, N / 8], packed along the
out-features, ``qzeros`` int32 [G, N / 8], and ``scales`` [G, N]. The nibbles of a word, least
first, hold its out-features 0, 2, 4, 6, 1, 3, 5, 7. weight = (u - zero) * scale.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import ModelLoadError
from engine.formats import REMEDY
from engine.formats.gptq import check_groups, read_group_size
from engine.formats.grouped import GroupedWeight
from engine.formats.pack_quantized import pack_rows, unpack_rows

METHOD = "awq"
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, slots=True)
class AwqScheme:
    """What the configuration says of all layers; ``group_size`` None: one group."""

    group_size: int | None
    format: str = METHOD

    def unpack(
        self, tensors: dict[str, Tensor], columns: int
    ) -> tuple[GroupedWeight, Tensor | None]:
        """See ``unpack``; raises ``ValueError`` also where tensors and scheme do not agree.

        Second is None: columns lie in the order of their groups.
        """
        weight = unpack(tensors)
        if weight.q_NK.shape[1] != columns:
            raise ValueError(f"qweight has {weight.q_NK.shape[1]} rows, not {columns}")
        check_groups(weight.scale_NG.shape[1], columns, self.group_size)
        return weight, None


def read_scheme(config: dict[str, Any]) -> AwqScheme:
    """From ``quantization_config``. Raises ``ModelLoadError`` for what is not served."""
    # A file of its own, quant_config.json, has other names than config.json.
    names = {"w_bit": "bits", "q_group_size": "group_size"}
    config = {names.get(key, key): value for key, value in config.items()}
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise ModelLoadError(f"AWQ version {version!r} is not served, gemm is: {REMEDY}")
    if (bits := config.get("bits")) != 4:
        raise ModelLoadError(f"AWQ of {bits!r} bits is not served, of 4 is: {REMEDY}")
    if not config.get("zero_point", True):
        raise ModelLoadError(f"AWQ with zero_point false is not served: {REMEDY}")
    return AwqScheme(read_group_size("AWQ", config))


def pack(weight: GroupedWeight) -> dict[str, Tensor]:
    """The layer's tensors, by their names after the module's name."""
    zero_NG = weight.zero_NG
    if zero_NG is None:
        zero_NG = torch.zeros(weight.scale_NG.shape, dtype=torch.int8)
    return {
        "qweight": pack_rows(_reordered(weight.q_NK.t(), _ORDER), 4),
        "qzeros": pack_rows(_reordered(zero_NG.t(), _ORDER), 4),
        "scales": weight.scale_NG.t().contiguous(),
    }


def unpack(tensors: dict[str, Tensor]) -> GroupedWeight:
    """Inverse of ``pack``. Raises ``ValueError`` on other dtypes or shapes."""
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    if qweight.dtype != torch.int32 or qweight.ndim != 2:
        raise ValueError(f"qweight must be int32 [K, N / 8], not {list(qweight.shape)}")
    columns, outs = len(qweight), 8 * qweight.shape[1]
    if not scales.is_floating_point() or scales.ndim != 2 or scales.shape[1] != outs:
        raise ValueError(f"scales must be floating [G, N], not {list(scales.shape)}")
    groups = len(scales)
    if not groups or columns % groups:
        raise ValueError(f"{groups} groups do not divide {columns} in-features")
    if qzeros.dtype != torch.int32 or qzeros.shape != (groups, outs // 8):
        raise ValueError(f"qzeros is {qzeros.dtype} {list(qzeros.shape)}")
    q_KN, zero_GN = (_reordered(unpack_rows(w, 4, outs), _INVERSE) for w in (qweight, qzeros))
    return GroupedWeight(
        q_KN.t().contiguous(),
        scales.t().contiguous(),
        zero_GN.t().contiguous() if bool(zero_GN.any()) else None,
    )


def _reordered(values_MN: Tensor, order: tuple[int, ...]) -> Tensor:
    """Each eight columns in this order."""
    reordered: Tensor = values_MN.unflatten(1, (-1, 8))[..., list(order)].flatten(1)
    return reordered
