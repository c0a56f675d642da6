"""INT8 KV cache in the layout that the CPU kernels read.

The numbers are those of ``Int8KvCache``: one scale for each token and head, x ~ q * scale.
A page holds one KV head's tokens of one block, keys before values. Keys lie [S / 16, D / 4,
16, 4] as q + 128, so that one vector load brings four features of sixteen tokens, as the
processor's dot products of four bytes take them; values lie [S / 2, D, 2], two tokens side by
side, as its dot products of two 16-bit numbers take them. D is padded with zeros to whole
vectors.
"""

import torch
from torch import Tensor

from engine.kernels.cpu.kv import KvPages, write_kv
from engine.kernels.cpu.library import address, kernels
from engine.kernels.cpu.memory import aligned_empty
from engine.kv_cache.base import KvShape

LANES = 16


class InterleavedInt8KvCache:
    """Pages [L, P, J, bytes] and float32 scales [L, P, J, (key, value), S].

    ``layers`` are the same as the native kernels take them.
    """

    dtype = "int8"

    def __init__(self, shape: KvShape, num_blocks: int) -> None:
        assert self.takes(shape.block_size), shape
        self._shape = shape
        self.kernel = kernels().name
        self._padded_dim = _padded(shape.head_dim)
        size = (shape.layers, num_blocks, shape.kv_heads)
        self.pages = _allocate((*size, 2 * shape.block_size * self._padded_dim), torch.uint8)
        self.scales = _allocate((*size, 2, shape.block_size), torch.float32)
        self.layers = tuple(self._layer(layer) for layer in range(shape.layers))

    @staticmethod
    def takes(block_size: int) -> bool:
        """Whether blocks of that size fit the layout."""
        return block_size % LANES == 0

    @staticmethod
    def block_bytes(shape: KvShape) -> int:
        """See ``KvCache``."""
        vectors = 2 * shape.layers * shape.kv_heads * shape.block_size
        return vectors * (_padded(shape.head_dim) + 4)

    @property
    def nbytes(self) -> int:
        """See ``KvCache``."""
        return self.pages.nbytes + self.scales.nbytes

    def write(self, layer: int, k_TJD: Tensor, v_TJD: Tensor, slots_T: Tensor) -> None:
        """See ``KvCache``."""
        write_kv(k_TJD.contiguous(), v_TJD.contiguous(), slots_T, self.layers[layer])

    def written_scales(self, slots_T: Tensor) -> Tensor:
        """See ``KvCache``."""
        blocks, offsets = slots_T // self._shape.block_size, slots_T % self._shape.block_size
        scales_TLJ2 = self.scales[:, blocks, :, :, offsets]
        return scales_TLJ2.transpose(2, 3).flatten(2).transpose(0, 1)

    def read(
        self, layer: int, block_tables_BP: Tensor, context_lens_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``KvCache``; slow, for scoring and comparison."""
        half, dim = self._shape.block_size * self._padded_dim, self._shape.head_dim
        pages_BPJX = self.pages[layer][block_tables_BP]
        quads = pages_BPJX[..., :half].unflatten(-1, (-1, self._padded_dim // 4, LANES, 4))
        k_BPJSD = quads.transpose(-3, -2).flatten(-2).flatten(-3, -2)[..., :dim].float() - 128.0
        pairs = pages_BPJX[..., half:].view(torch.int8).unflatten(-1, (-1, self._padded_dim, 2))
        values = pairs.transpose(-2, -1).flatten(-3, -2)
        scales_BPJ2S = self.scales[layer][block_tables_BP]
        return (
            _scaled(k_BPJSD, scales_BPJ2S[..., 0, :], context_lens_B),
            _scaled(values[..., :dim].float(), scales_BPJ2S[..., 1, :], context_lens_B),
        )

    def _layer(self, layer: int) -> KvPages:
        shape, places = self._shape, (address(self.pages[layer]), address(self.scales[layer]))
        sizes = (shape.block_size, shape.kv_heads, shape.head_dim, self._padded_dim)
        return KvPages(*places, *sizes)


def _padded(head_dim: int) -> int:
    return -(-head_dim // LANES) * LANES


def _allocate(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised: nothing is read where nothing was written."""
    return aligned_empty(torch.Size(size).numel() * dtype.itemsize).view(dtype).view(size)


def _scaled(x_BPJSD: Tensor, scales_BPJS: Tensor, context_lens_B: Tensor) -> Tensor:
    """float32 [B, J, P * S, D], zero after the context, where a stale scale may be NaN."""
    _, width, _, block_size, _ = x_BPJSD.shape
    positions = torch.arange(width * block_size).view(width, 1, block_size)
    after = positions >= context_lens_B[:, None, None, None]
    scaled = x_BPJSD * scales_BPJS.masked_fill(after, 0.0)[..., None]
    return scaled.transpose(1, 2).flatten(2, 3)
