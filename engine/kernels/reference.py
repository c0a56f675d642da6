"""Plain torch references: what each kernel must compute, written for reading, not for speed."""

from typing import Any

import torch
from torch import Tensor

from engine.formats.grouped import GroupedWeight


def quantize_activations(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [M, K] and float32 scales [M]: one symmetric scale for each row.

    q = round_half_even(x * (127 / absmax)); the scale is absmax / 127, 0 for a zero row.
    """
    absmax_M = x_MK.abs().amax(1)
    # A number over a tensor would be its reciprocal times the number, which rounds twice.
    factor_M = torch.where(absmax_M > 0, torch.tensor(127.0) / absmax_M, 0.0)
    return (x_MK * factor_M[:, None]).round().to(torch.int8), absmax_M * (1.0 / 127.0)


def int8_linear(x_MK: Tensor, q_NK: Tensor, scale_N: Tensor) -> Tensor:
    """W8A8: float32 [M, N] = float(sum over K of int8 * int8) * (weight scale * row scale)."""
    q_MK, scale_M = quantize_activations(x_MK)
    sums_MN = (q_MK.long() @ q_NK.long().t()).float()
    return sums_MN * (scale_M[:, None] * scale_N)


def int4_linear(x_MK: Tensor, weight: GroupedWeight) -> Tensor:
    """W4A8: float32 [M, N].

    Each group's sum of activation * (q - zero) is exact; the sums are added as
    acc = fma(float(sum), scale, acc), group 0 first, and then multiplied by the row's scale.
    """
    q_MK, scale_M = quantize_activations(x_MK)
    integers_NK, acc_MN = weight.integers().long(), torch.zeros(len(x_MK), len(weight.q_NK))
    for group, begin in enumerate(range(0, x_MK.shape[1], weight.group)):
        part = slice(begin, begin + weight.group)
        sums_MN = q_MK[:, part].long() @ integers_NK[:, part].t()
        acc_MN = fma(sums_MN.float(), weight.scale_NG[:, group], acc_MN)
    return acc_MN * scale_M[:, None]


def weight_only_linear(x_MK: Tensor, weight: GroupedWeight) -> Tensor:
    """W8A16, W4A16: float32 [M, N], float activations and dequantised weights."""
    return (x_MK.double() @ weight.dequantize().double().t()).float()


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """float32 a * b + c, rounded once.

    The product is exact in float64. Its sum with ``c`` is rounded to odd there, so that the
    second rounding, to float32, is right (Boldo and Melquiond, "Emulation of FMA and correctly
    rounded sums: proved algorithms using rounding to odd", 2008).
    """
    product, c64 = a.double() * b.double(), c.double()
    total = product + c64
    rest = total - product
    error = (product - (total - rest)) + (c64 - rest)
    bits = total.view(torch.int64)
    towards_zero = (error > 0) != (total > 0)
    moved = torch.where(towards_zero, bits - 1, bits + 1)
    odd = torch.where((error != 0) & (bits % 2 == 0), moved, bits)
    return odd.view(torch.float64).float()


def dense_linear(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """float32 [M, N]."""
    return x_MK @ weight_NK.t()


def rms_norm(x_MK: Tensor, weight_K: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    return x_MK * torch.rsqrt(x_MK.pow(2).mean(-1, keepdim=True) + eps) * weight_K


def layer_norm(x_MK: Tensor, weight_K: Tensor, bias_K: Tensor | None, eps: float) -> Tensor:
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias over the last dimension."""
    centred_MK = x_MK - x_MK.mean(-1, keepdim=True)
    normed_MK = rms_norm(centred_MK, weight_K, eps)
    return normed_MK if bias_K is None else normed_MK + bias_K


def activation(x_MK: Tensor, function: str, *, gated: bool) -> Tensor:
    """An MLP's activations; where it is gated, those of the first half times the second."""
    gate_MK, *values = x_MK.chunk(2, dim=1) if gated else (x_MK,)
    match function:
        case "silu":
            out_MK = gate_MK * torch.sigmoid(gate_MK)
        case "gelu":
            out_MK = 0.5 * gate_MK * (1 + torch.erf(gate_MK * 0.5**0.5))
        case "gelu_tanh":
            inner_MK = (2 / torch.pi) ** 0.5 * (gate_MK + 0.044715 * gate_MK**3)
            out_MK = 0.5 * gate_MK * (1 + torch.tanh(inner_MK))
        case "relu":
            out_MK = gate_MK.clamp(min=0)
        case _:
            raise ValueError(f"activation {function!r} is unknown")
    return out_MK * values[0] if values else out_MK


def attention(
    q_LHD: Tensor,
    k_SJD: Tensor,
    v_SJD: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    cap: float | None = None,
    slopes_H: Tensor | None = None,
) -> Tensor:
    """Causal grouped-query attention of one sequence's last L positions, float32 [L, H, D].

    Args:
        q_LHD, k_SJD, v_SJD: queries of the last L of S positions, keys and values of all.
        scale: of the scores; 1 / sqrt(D) where it is None.
        window: positions that a query sees, its own among them; None sees all before it.
        cap: scores become cap * tanh(score / cap).
        slopes_H: ALiBi: a score falls by a head's slope for each position of distance.
    """
    scores_HLS = attention_scores(
        q_LHD, k_SJD, scale=scale, window=window, cap=cap, slopes_H=slopes_H
    )
    v_SHD = v_SJD.repeat_interleave(q_LHD.shape[1] // v_SJD.shape[1], dim=1)
    return torch.einsum("hls,shd->lhd", scores_HLS.softmax(-1), v_SHD)


def attention_scores(
    q_LHD: Tensor,
    k_SJD: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    cap: float | None = None,
    slopes_H: Tensor | None = None,
) -> Tensor:
    """[H, L, S]: what ``attention`` takes the softmax of; -inf where a query does not see."""
    L, H, D = q_LHD.shape
    S, J, _ = k_SJD.shape
    k_SHD = k_SJD.repeat_interleave(H // J, dim=1)
    scores_HLS = torch.einsum("lhd,shd->hls", q_LHD, k_SHD)
    scores_HLS = scores_HLS * (D**-0.5 if scale is None else scale)
    if cap is not None:
        scores_HLS = cap * torch.tanh(scores_HLS / cap)
    distance_LS = torch.arange(S - L, S)[:, None] - torch.arange(S)
    if slopes_H is not None:
        scores_HLS = scores_HLS - slopes_H[:, None, None] * distance_LS
    hidden_LS = (distance_LS < 0) | (distance_LS >= (window or S))
    return scores_HLS.masked_fill(hidden_LS, -torch.inf)


def int8_attention(
    q_LHD: Tensor,
    k_SJD: Tensor,
    v_SJD: Tensor,
    *,
    chunk: int = 256,
    levels: int | None = 32767,
    **options: Any,
) -> Tensor:
    """``attention`` as it is on INT8 pages, float32 [L, H, D].

    Queries are rounded as keys and values were: of each query head q = round_half_even(x * (127 /
    absmax)), x ~ q * (absmax / 127). In every chunk of positions, counted from the first, the
    weights exp(score) * value scale are rounded to levels of the chunk's largest, round_half_even(w
    * (levels / largest)), and multiplied with the values' integers. The softmax divides by the sum
    of the exponentials as they were. Where ``levels`` is None, weights are not rounded.
    """
    q, scale = quantize_activations(q_LHD.flatten(0, 1))
    rounded_LHD = (q * scale[:, None]).view_as(q_LHD).to(k_SJD.dtype)
    if levels is None:
        return attention(rounded_LHD, k_SJD, v_SJD, **options)
    scores_HLS = attention_scores(rounded_LHD, k_SJD, **options)
    exponentials_HLS = (scores_HLS - scores_HLS.amax(-1, keepdim=True)).exp()
    scale_SJ = v_SJD.abs().amax(-1) / 127
    v_SJD = (v_SJD / scale_SJ.clamp(min=torch.finfo(v_SJD.dtype).tiny)[..., None]).round()
    group = q_LHD.shape[1] // v_SJD.shape[1]
    sums_LHD = torch.zeros_like(rounded_LHD)
    for begin in range(0, len(k_SJD), chunk):
        part = slice(begin, begin + chunk)
        scale_HS = scale_SJ[part].repeat_interleave(group, dim=1).t()
        weights_HLS = exponentials_HLS[..., part] * scale_HS[:, None]
        level_HL1 = weights_HLS.amax(-1, keepdim=True) / levels
        level_HL1 = level_HL1.clamp(min=torch.finfo(level_HL1.dtype).tiny)
        rounded_HLS = (weights_HLS / level_HL1).round() * level_HL1
        v_SHD = v_SJD[part].repeat_interleave(group, dim=1)
        sums_LHD += torch.einsum("hls,shd->lhd", rounded_HLS, v_SHD)
    return sums_LHD / exponentials_HLS.sum(-1).t()[..., None]
