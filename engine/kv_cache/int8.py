"""INT8 KV cache with a dynamic scale for each token and head.

q = round_half_even(x * (127 / absmax)) over the head's D values, x ~ q * (absmax / 127).
No calibration: the scale is that of the very vector. Scales lie in arrays of their own.
"""

import torch
from torch import Tensor

from engine.kv_cache.base import KvShape


class Int8KvCache:
    """int8 keys and values [L, P, J, S, D], float32 scales [L, P, J, S]."""

    dtype = "int8"
    kernel = "torch"

    def __init__(self, shape: KvShape, num_blocks: int) -> None:
        self._block_size = shape.block_size
        size = (shape.layers, num_blocks, shape.kv_heads, shape.block_size)
        self._k = torch.zeros((*size, shape.head_dim), dtype=torch.int8)
        self._v = torch.zeros((*size, shape.head_dim), dtype=torch.int8)
        self._k_scale = torch.zeros(size)
        self._v_scale = torch.zeros(size)

    @staticmethod
    def block_bytes(shape: KvShape) -> int:
        """See ``KvCache``."""
        return 2 * (shape.head_dim + 4) * shape.layers * shape.kv_heads * shape.block_size

    @property
    def nbytes(self) -> int:
        """See ``KvCache``."""
        tensors = (self._k, self._v, self._k_scale, self._v_scale)
        return sum(tensor.nbytes for tensor in tensors)

    def write(self, layer: int, k_TJD: Tensor, v_TJD: Tensor, slots_T: Tensor) -> None:
        """See ``KvCache``."""
        blocks, offsets = slots_T // self._block_size, slots_T % self._block_size
        for pages, scales, x_TJD in (
            (self._k, self._k_scale, k_TJD),
            (self._v, self._v_scale, v_TJD),
        ):
            q_TJD, scale_TJ = quantize_rows(x_TJD)
            pages[layer][blocks, :, offsets] = q_TJD
            scales[layer][blocks, :, offsets] = scale_TJ

    def written_scales(self, slots_T: Tensor) -> Tensor:
        """See ``KvCache``."""
        blocks, offsets = slots_T // self._block_size, slots_T % self._block_size
        both = [scales[:, blocks, :, offsets] for scales in (self._k_scale, self._v_scale)]
        return torch.cat(both, dim=-1).transpose(0, 1)

    def read(
        self, layer: int, block_tables_BP: Tensor, context_lens_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``KvCache``."""
        return (
            _gather(self._k[layer], self._k_scale[layer], block_tables_BP, context_lens_B),
            _gather(self._v[layer], self._v_scale[layer], block_tables_BP, context_lens_B),
        )


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and float32 scales over the last dimension; a zero row has scale 0."""
    absmax = x.abs().amax(-1)
    # A number over a tensor would be its reciprocal times the number, which rounds twice.
    factor = torch.where(absmax > 0, torch.tensor(127.0) / absmax, 0.0)
    return (x * factor[..., None]).round_().to(torch.int8), absmax * (1.0 / 127.0)


def _gather(
    pages_PJSD: Tensor, scales_PJS: Tensor, tables_BP: Tensor, context_lens_B: Tensor
) -> Tensor:
    batch, width = tables_BP.shape
    _, heads, block_size, head_dim = pages_PJSD.shape
    out = torch.empty(batch, heads, width, block_size, head_dim)
    out.copy_(pages_PJSD[tables_BP].transpose(1, 2))
    scales = scales_PJS[tables_BP].transpose(1, 2)
    # A stale scale may not be finite, and 0 * NaN is NaN.
    positions = torch.arange(width * block_size).view(width, block_size)
    after = positions >= context_lens_B[:, None, None]
    out.mul_(scales.masked_fill(after[:, None], 0.0)[..., None])
    return out.flatten(2, 3)
