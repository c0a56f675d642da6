"""What a paged KV cache is to the rest of the engine.

Shape letters: L layers, P blocks, J KV heads, S positions (of one block, or of a
context), D head size, T tokens of a step, B sequences.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class KvShape:
    """Dimensions of the cached keys and values, without the number of blocks."""

    layers: int
    kv_heads: int
    head_dim: int
    block_size: int


class KvCache(Protocol):
    """Keys and values of all layers. One block table serves all layers.

    Keys and values are rounded to the cache's precision when they are written, and all
    attention, a prompt's too, reads them back from here: so a token's output does not
    depend on where its prompt was cut into chunks.
    """

    dtype: str
    kernel: str  # what attends to it, for reports

    def __init__(self, shape: KvShape, num_blocks: int) -> None: ...

    @staticmethod
    def block_bytes(shape: KvShape) -> int:
        """Bytes that one block takes in all layers together."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in memory."""
        ...

    def write(self, layer: int, k_TJD: Tensor, v_TJD: Tensor, slots_T: Tensor) -> None:
        """Stores float32 keys and values at ``slots_T`` (block * block size + offset)."""
        ...

    def written_scales(self, slots_T: Tensor) -> Tensor | None:
        """float32 [L, T, heads of keys and of values]: of what was written at ``slots_T``.

        None where there are no scales.
        """
        ...

    def read(
        self, layer: int, block_tables_BP: Tensor, context_lens_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """float32 keys and values [B, J, S, D], S = P * block size; zero after the context."""
        ...
