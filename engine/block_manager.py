"""Hands out the KV cache's blocks. Knows block ids only: no tensors, no requests.

Every block is either free or owned by exactly one block table; the caller keeps the table.
"""


class BlockManager:
    """A pool of ``num_blocks`` blocks of ``block_size`` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError("num_blocks and block_size must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack: the block freed last is the one most likely still in a CPU cache.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owned = [False] * num_blocks

    def __repr__(self) -> str:
        return f"<BlockManager free {self.free_blocks} of {self.num_blocks} x {self.block_size}>"

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the whole pool holds: the longest sequence that can ever run."""
        return self.num_blocks * self.block_size

    def missing_blocks(self, table: list[int], tokens: int) -> int:
        """Blocks to add to ``table`` until it holds ``tokens`` tokens."""
        return max(0, -(-tokens // self.block_size) - len(table))

    def can_grow(self, table: list[int], tokens: int) -> bool:
        """Whether ``grow`` would succeed."""
        return self.missing_blocks(table, tokens) <= self.free_blocks

    def grow(self, table: list[int], tokens: int) -> None:
        """Appends blocks to ``table`` until it holds ``tokens`` tokens."""
        missing = self.missing_blocks(table, tokens)
        assert missing <= self.free_blocks, "ask can_grow first"
        for _ in range(missing):
            block = self._free.pop()
            self._owned[block] = True
            table.append(block)

    def release(self, table: list[int]) -> None:
        """Frees all blocks of ``table`` and empties it."""
        for block in reversed(table):
            assert self._owned[block], f"block {block} is freed twice"
            self._owned[block] = False
            self._free.append(block)
        table.clear()

    def check_invariants(self, tables: list[list[int]]) -> None:
        """Raises ``RuntimeError`` unless free + owned = all and no block has two owners."""
        in_use = [block for table in tables for block in table]
        if len(set(in_use)) != len(in_use):
            raise RuntimeError(f"{self!r}: a block is in two tables")
        if sorted(in_use + self._free) != list(range(self.num_blocks)):
            raise RuntimeError(f"{self!r}: {len(in_use)} blocks in tables, so some are lost")
        if any(self._owned[block] for block in self._free):
            raise RuntimeError(f"{self!r}: a free block counts as owned")
