"""Kernels from torch's own operators: run everywhere, need no compiler."""

import functools
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.formats.grouped import GroupedWeight
from engine.kernels.reference import fma, quantize_activations

logger = logging.getLogger(__name__)

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
# Sums of so many products of int8 are exact in float32: 1024 * 128 * 127 < 2 ** 24.
_EXACT_PRODUCTS = 1024


def int8_linear(x_MK: Tensor, q_NK: Tensor, scale_N: Tensor) -> Tensor:
    """See ``reference.int8_linear``; the integer product is oneDNN's, and exact."""
    q_MK, scale_M = quantize_activations(x_MK)
    sums_MN = torch._int_mm(q_MK, q_NK.t()) if int_mm_is_exact() else _product(q_MK, q_NK)
    return sums_MN.float().mul_(scale_M[:, None] * scale_N)


def int4_linear(x_MK: Tensor, weight: GroupedWeight) -> Tensor:
    """See ``reference.int4_linear``: one product for each group, so that it is slow."""
    q_MK, scale_M = quantize_activations(x_MK)
    multiply = torch._int_mm if int_mm_is_exact() else lambda q, w: _product(q, w.t())
    acc_MN = torch.zeros(len(q_MK), len(weight.q_NK))
    for group, begin in enumerate(range(0, x_MK.shape[1], weight.group)):
        part = slice(begin, begin + weight.group)
        q_MS = q_MK[:, part].contiguous()
        sums_MN = multiply(q_MS, weight.q_NK[:, part].contiguous().t()).float()
        if weight.zero_NG is not None:
            sums_MN -= q_MS.sum(1, dtype=torch.float32)[:, None] * weight.zero_NG[:, group]
        acc_MN = fma(sums_MN, weight.scale_NG[:, group], acc_MN)
    return acc_MN.mul_(scale_M[:, None])


@functools.cache
def int_mm_is_exact() -> bool:
    """Whether ``torch._int_mm`` gives the exact sums on this processor.

    Without VNNI, oneDNN adds pairs of products in 16 bits, which saturate.
    """
    q = torch.full((4, 64), 127, dtype=torch.int8)
    exact = bool((torch._int_mm(q, (-1 - q).t()) == 64 * 127 * -128).all())
    if not exact:
        logger.warning("no VNNI: INT8 products are computed in float32, exact but slow")
    return exact


def int8_product() -> str:
    """Name of what computes the INT8 products here."""
    return "torch._int_mm" if int_mm_is_exact() else "float32 products (no VNNI)"


def _product(q_MK: Tensor, q_NK: Tensor) -> Tensor:
    """Exact int32 [M, N] on any processor."""
    sums_MN = torch.zeros(q_MK.shape[0], q_NK.shape[0], dtype=torch.int32)
    parts = zip(q_MK.split(_EXACT_PRODUCTS, 1), q_NK.split(_EXACT_PRODUCTS, 1), strict=True)
    for x_MK, w_NK in parts:
        sums_MN += F.linear(x_MK.float(), w_NK.float()).int()
    return sums_MN


def dense_linear(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """See ``reference.dense_linear``."""
    return F.linear(x_MK, weight_NK)


def rms_norm(x_MK: Tensor, weight_K: Tensor, eps: float) -> Tensor:
    """See ``reference.rms_norm``."""
    return F.rms_norm(x_MK, weight_K.shape, weight_K, eps)


def layer_norm(x_MK: Tensor, weight_K: Tensor, bias_K: Tensor | None, eps: float) -> Tensor:
    """See ``reference.layer_norm``."""
    return F.layer_norm(x_MK, weight_K.shape, weight_K, bias_K, eps)


def activation(x_MK: Tensor, function: str, *, gated: bool) -> Tensor:
    """See ``reference.activation``."""
    if not gated:
        return _ACTIVATIONS[function](x_MK)
    gate_MK, value_MK = x_MK.chunk(2, dim=1)
    return _ACTIVATIONS[function](gate_MK).mul_(value_MK)


def attention(
    q_BLHD: Tensor,
    k_BJSD: Tensor,
    v_BJSD: Tensor,
    context_lens_B: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    cap: float | None = None,
    slopes_H: Tensor | None = None,
) -> Tensor:
    """Causal grouped-query attention, float32 [B, L, H, D]; options as in the reference.

    The L queries of a sequence are its last positions; ``k`` and ``v`` are padded after
    ``context_lens_B``. The heads of a group become rows of one product, which spares the
    copies of keys that expanding them would cost.
    """
    B, L, H, D = q_BLHD.shape
    J, S = k_BJSD.shape[1:3]
    rows = q_BLHD.view(B, L, J, H // J, D).permute(0, 2, 3, 1, 4).reshape(B, J, H // J * L, D)
    last_BL1 = (context_lens_B[:, None] - L + torch.arange(L))[..., None]
    visible_BLS = torch.arange(S) <= last_BL1
    if window is not None:
        visible_BLS &= torch.arange(S) > last_BL1 - window
    mask = visible_BLS[:, None].repeat(1, 1, H // J, 1)  # rows are group-major
    if slopes_H is not None:
        distance = (last_BL1 - torch.arange(S))[:, None, None]
        fall = (slopes_H.view(J, H // J, 1, 1) * distance).flatten(2, 3)  # [B, J, rows, S]
        mask = (-fall).masked_fill_(~mask, -torch.inf)
    if cap is not None:
        scale = D**-0.5 if scale is None else scale
        out = _capped_attention(rows, k_BJSD, v_BJSD, mask, scale, cap)
    else:
        out = F.scaled_dot_product_attention(rows, k_BJSD, v_BJSD, attn_mask=mask, scale=scale)
    return out.view(B, J, H // J, L, D).permute(0, 3, 1, 2, 4).reshape(B, L, H, D)


def _capped_attention(
    rows: Tensor, k_BJSD: Tensor, v_BJSD: Tensor, mask: Tensor, scale: float, cap: float
) -> Tensor:
    scores = (rows @ k_BJSD.mT).mul_(scale / cap).tanh_().mul_(cap)
    return scores.masked_fill_(~mask, -torch.inf).softmax(-1) @ v_BJSD
