"""Plain torch references: what each kernel must compute, written for reading, not for speed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.endings import NOT_FINITE
from engine.formats.float_quantized import LARGEST, Float8Weight, to_float8
from engine.formats.grouped import GroupedWeight
from engine.types import SamplingParams
from engine.uniform import uniform_number

# Out-features that are float64 at a time.
_FLOAT64_ROWS = 1024

# What others are taken for: with these, no difference of logits divided by them is NaN.
TEMPERATURES = (torch.finfo(torch.float32).tiny, 1e30)


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


def float8_activations(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [M, K] and float32 scales [M]: one for each row.

    q is the FP8 value nearest to x / scale, the scale absmax / 448, or the smallest normal
    float32 where that is larger: of a zero row, for one.
    """
    scale_M = (x_MK.abs().amax(1) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return to_float8(x_MK / scale_M[:, None]), scale_M


def float8_linear(x_MK: Tensor, weight: Float8Weight) -> Tensor:
    """FP8: float32 [M, N] = float(sum over K of float8 * float8) * (row scale * weight scale).

    The sums are exact: products are multiples of 2^-18 below 2^18, and float64 holds the sum
    of 2^17 of them. So a row does not depend on the others.
    """
    q_MK, scale_M = float8_activations(x_MK)
    x64_MK, parts = q_MK.double(), weight.q_NK.split(_FLOAT64_ROWS)
    sums_MN = torch.cat([x64_MK @ part.double().t() for part in parts], 1).float()
    return sums_MN * (scale_M[:, None] * weight.scale_N)


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


def sample(
    logits_RV: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    choices: Sequence[int],
    *,
    edited: bool,
) -> list[int]:
    """The next token of each row of float32 logits; ``NOT_FINITE`` where there is none.

    Temperature, then top-k, top-p and min-p, in the order of transformers; of equal logits the
    first ones are kept. What is kept is drawn in the order of columns. ``edited`` says that
    -inf is a token that is not allowed and that there is no NaN; elsewhere both are errors.
    Temperatures but 0 count as one from ``TEMPERATURES``.
    """
    rows = zip(logits_RV, params, positions, choices, strict=True)
    return [_sample_row(*row, edited=edited) for row in rows]


def _sample_row(
    logits_V: Tensor, params: SamplingParams, position: int, choice: int, *, edited: bool
) -> int:
    if logits_V.max() == -torch.inf or not (edited or bool(logits_V.isfinite().all())):
        return NOT_FINITE
    if params.temperature == 0:
        return int(logits_V.argmax())
    order_V = logits_V.sort(descending=True, stable=True).indices
    largest_V = logits_V[order_V].double()
    low, high = TEMPERATURES
    weights_V = ((largest_V - largest_V[0]) / min(max(params.temperature, low), high)).exp()
    if params.top_k:
        weights_V[params.top_k :] = 0
    kept_V = weights_V >= params.min_p
    if params.top_p < 1:
        # The smallest set of tokens whose probabilities reach p.
        before_V = weights_V.cumsum(0) - weights_V
        kept_V &= before_V < params.top_p * weights_V.sum()
    by_column_V = torch.zeros_like(weights_V).scatter(0, order_V, weights_V * kept_V)
    cumulative_V = by_column_V.cumsum(0)
    point = uniform_number(params.seed, position, choice) * cumulative_V[-1]
    return int((cumulative_V <= point).sum().clamp(max=int(by_column_V.nonzero().max())))
