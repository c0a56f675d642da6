"""Unquantised KV cache, for comparison."""

import torch
from torch import Tensor

from engine.kv_cache.base import KvShape


class Fp32KvCache:
    """float32 keys and values, [L, P, J, S, D] each."""

    dtype = "fp32"
    kernel = "torch"

    def __init__(self, shape: KvShape, num_blocks: int) -> None:
        self._block_size = shape.block_size
        size = (shape.layers, num_blocks, shape.kv_heads, shape.block_size, shape.head_dim)
        self._k = torch.zeros(size)
        self._v = torch.zeros(size)

    @staticmethod
    def block_bytes(shape: KvShape) -> int:
        """See ``KvCache``."""
        return 2 * 4 * shape.layers * shape.kv_heads * shape.block_size * shape.head_dim

    @property
    def nbytes(self) -> int:
        """See ``KvCache``."""
        return self._k.nbytes + self._v.nbytes

    def write(self, layer: int, k_TJD: Tensor, v_TJD: Tensor, slots_T: Tensor) -> None:
        """See ``KvCache``."""
        blocks, offsets = slots_T // self._block_size, slots_T % self._block_size
        self._k[layer][blocks, :, offsets] = k_TJD
        self._v[layer][blocks, :, offsets] = v_TJD

    def written_scales(self, slots_T: Tensor) -> None:
        """See ``KvCache``: there are none."""

    def read(
        self, layer: int, block_tables_BP: Tensor, context_lens_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``KvCache``."""
        return (
            _gather(self._k[layer], block_tables_BP, context_lens_B),
            _gather(self._v[layer], block_tables_BP, context_lens_B),
        )


def _gather(pages_PJSD: Tensor, tables_BP: Tensor, context_lens_B: Tensor) -> Tensor:
    picked = pages_PJSD[tables_BP].transpose(1, 2).flatten(2, 3)  # [B, J, P * S, D]
    # What an earlier owner left behind may not be finite, and 0 * NaN is NaN.
    after = torch.arange(picked.shape[2]) >= context_lens_B[:, None]
    return picked.masked_fill_(after[:, None, :, None], 0.0)
