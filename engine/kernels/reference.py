"""Plain torch references: what each kernel must compute, written for reading, not for speed."""

import torch
from torch import Tensor


def quantize_activations(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [M, K] and float32 scales [M]: one symmetric scale for each row.

    q = round_half_even(x * (127 / absmax)); the scale is absmax / 127, 0 for a zero row.
    """
    absmax_M = x_MK.abs().amax(1)
    factor_M = torch.where(absmax_M > 0, 127.0 / absmax_M, 0.0)
    return (x_MK * factor_M[:, None]).round().to(torch.int8), absmax_M * (1.0 / 127.0)


def int8_linear(x_MK: Tensor, q_NK: Tensor, scale_N: Tensor) -> Tensor:
    """W8A8: float32 [M, N] = float(sum over K of int8 * int8) * (weight scale * row scale)."""
    q_MK, scale_M = quantize_activations(x_MK)
    sums_MN = (q_MK.long() @ q_NK.long().t()).float()
    return sums_MN * (scale_M[:, None] * scale_N)


def dense_linear(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """float32 [M, N]."""
    return x_MK @ weight_NK.t()


def rms_norm(x_MK: Tensor, weight_K: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    return x_MK * torch.rsqrt(x_MK.pow(2).mean(-1, keepdim=True) + eps) * weight_K


def attention(q_LHD: Tensor, k_SJD: Tensor, v_SJD: Tensor) -> Tensor:
    """Causal grouped-query attention of one sequence's last L positions, float32 [L, H, D]."""
    L, H, D = q_LHD.shape
    S, J, _ = k_SJD.shape
    k_SHD = k_SJD.repeat_interleave(H // J, dim=1)
    v_SHD = v_SJD.repeat_interleave(H // J, dim=1)
    scores_HLS = torch.einsum("lhd,shd->hls", q_LHD, k_SHD) / D**0.5
    future = torch.arange(S) > torch.arange(S - L, S)[:, None]
    probabilities = scores_HLS.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("hls,shd->lhd", probabilities, v_SHD)
