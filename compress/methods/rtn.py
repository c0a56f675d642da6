"""Round to nearest: one symmetric scale for each output channel, no calibration.

Scale and grid are compressed-tensors' (``calculate_qparams``, ``quantize``): scale =
absmax / 127.5 in the weight's dtype, q = round-half-even(clamp(w / scale, -128, 127)).
The division is in float32 for every dtype, since in bf16 it would round twice.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.methods.base import LayerResult
from engine.formats.int_quantized import Int8Weight

_Q_MIN, _Q_MAX = -128, 127
# Rows are done in blocks of so many weights, whose temporaries fit a processor's cache.
_BLOCK_WEIGHTS = 1 << 18


@dataclass(frozen=True, slots=True)
class Rtn:
    """INT8 by rounding to the nearest point of each row's grid."""

    def apply(self, weight_NK: Tensor) -> LayerResult:
        """Shapes and errors as in ``Method.apply``. Temporaries take a few MB."""
        start = time.perf_counter()
        scale_N = channel_scale(weight_NK)
        q_NK = torch.empty(weight_NK.shape, dtype=torch.int8)
        error = norm = 0.0
        clipped = 0
        rows = max(1, _BLOCK_WEIGHTS // weight_NK.shape[1])
        for first in range(0, weight_NK.shape[0], rows):
            block = slice(first, first + rows)
            w_nK, scale_n1 = weight_NK[block].float(), scale_N[block, None].float()
            grid_nK = (w_nK / scale_n1).round_()
            q_nK = grid_nK.clamp(_Q_MIN, _Q_MAX)
            q_NK[block] = q_nK.to(torch.int8)
            clipped += int((grid_nK != q_nK).sum())
            norm += _sum_of_squares(w_nK)
            error += _sum_of_squares(torch.addcmul(w_nK, q_nK, scale_n1, value=-1))
        return LayerResult(
            weight=Int8Weight(q_NK, scale_N),
            relative_error=math.sqrt(error / norm) if norm else 0.0,
            clipped_share=clipped / weight_NK.numel(),
            nbytes=q_NK.nbytes + scale_N.nbytes,
            seconds=time.perf_counter() - start,
        )


def channel_scale(weight_NK: Tensor) -> Tensor:
    """Scale [N] in the weight's dtype; that dtype's epsilon where a row is zero, never 0."""
    absmax_N = torch.maximum(weight_NK.amax(dim=1), -weight_NK.amin(dim=1))
    scale_N = absmax_N / ((_Q_MAX - _Q_MIN) / 2)
    return scale_N.masked_fill_(scale_N == 0, torch.finfo(weight_NK.dtype).eps)


def _sum_of_squares(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
