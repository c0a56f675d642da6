"""Hands out the KV cache's blocks. Knows block ids only: no tensors, no requests.

A block is free, used (by one or more block tables, counted) or cached: full, owned by nobody,
kept for a request that begins with the same tokens, evicted least recently used first. A full
block is never written again, so tables may share it; a table's last, partly filled block is
its own. free + cached + used = all.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict

Digest = bytes


class BlockManager:
    """A pool of ``num_blocks`` blocks of ``block_size`` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError("num_blocks and block_size must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack: the block freed last is the one most likely still in a CPU cache.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._digest_of: dict[int, Digest] = {}
        self._block_of: dict[Digest, int] = {}

    def __repr__(self) -> str:
        return (
            f"<BlockManager free {len(self._free)} cached {len(self._cached)} "
            f"used {self.used_blocks} of {self.num_blocks} x {self.block_size}>"
        )

    @property
    def available_blocks(self) -> int:
        """Blocks that can be taken: free, or cached and evictable."""
        return len(self._free) + len(self._cached)

    @property
    def cached_blocks(self) -> int:
        """Blocks that are kept for their contents alone."""
        return len(self._cached)

    @property
    def used_blocks(self) -> int:
        """Blocks in at least one table."""
        return self.num_blocks - self.available_blocks

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the whole pool holds: the longest sequence that can ever run."""
        return self.num_blocks * self.block_size

    def missing_blocks(self, table: list[int], tokens: int) -> int:
        """Blocks to add to ``table`` until it holds ``tokens`` tokens."""
        return max(0, -(-tokens // self.block_size) - len(table))

    def can_grow(self, table: list[int], tokens: int) -> bool:
        """Whether ``grow`` would succeed."""
        return self.missing_blocks(table, tokens) <= self.available_blocks

    def grow(self, table: list[int], tokens: int) -> None:
        """Appends blocks to ``table`` until it holds ``tokens`` tokens."""
        missing = self.missing_blocks(table, tokens)
        assert missing <= self.available_blocks, "ask can_grow first"
        for _ in range(missing):
            block = self._free.pop() if self._free else self._evict()
            self._references[block] = 1
            table.append(block)

    def release(self, table: list[int]) -> None:
        """Gives up all blocks of ``table`` and empties it."""
        # Ends of prefixes go first, so that they are evicted before their beginnings.
        for block in reversed(table):
            assert self._references[block] > 0, f"block {block} is freed twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._digest_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)
        table.clear()

    def extend_digests(self, digests: list[Digest], tokens: list[int], salt: str) -> None:
        """Appends to ``digests`` until there is one for each full block of ``tokens``.

        A digest stands for its block and all that is before it. Different salts have none in
        common.
        """
        parent = digests[-1] if digests else _digest(salt.encode())
        size = self.block_size
        for begin in range(len(digests) * size, len(tokens) - size + 1, size):
            parent = _digest(parent + array("q", tokens[begin : begin + size]).tobytes())
            digests.append(parent)

    def match(self, digests: list[Digest]) -> list[int]:
        """The blocks of the longest known prefix; they stay as they are until ``share``."""
        blocks = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def can_share_and_grow(self, blocks: list[int], tokens: int) -> bool:
        """Whether a table of ``blocks`` can grow to ``tokens`` once it has taken them."""
        revived = sum(1 for block in blocks if block in self._cached)
        return self.missing_blocks(blocks, tokens) <= self.available_blocks - revived

    def share(self, table: list[int], blocks: list[int]) -> None:
        """Takes ``blocks`` of ``match`` into the empty ``table``."""
        assert not table, "a prefix comes first"
        for block in blocks:
            self._cached.pop(block, None)
            self._references[block] += 1
            table.append(block)

    def register(self, block: int, digest: Digest) -> None:
        """Remembers what a full, computed block of a table holds.

        Where another block holds the same already, that one stays the known one.
        """
        assert self._references[block] > 0, "only a used block can be registered"
        if digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def check_invariants(self, tables: list[list[int]]) -> None:
        """Raises ``RuntimeError`` where blocks are lost or references are miscounted."""
        used = Counter(block for table in tables for block in table)
        if any(self._references[block] != used[block] for block in range(self.num_blocks)):
            raise RuntimeError(f"{self!r}: references and tables differ")
        everywhere = sorted([*used, *self._free, *self._cached])
        if everywhere != list(range(self.num_blocks)):
            raise RuntimeError(f"{self!r}: free + cached + used is not all")
        if any(len(set(table)) != len(table) for table in tables):
            raise RuntimeError(f"{self!r}: a table has a block twice")
        if {digest: block for block, digest in self._digest_of.items()} != self._block_of:
            raise RuntimeError(f"{self!r}: digests and blocks differ")
        unknown = [block for block in self._cached if block not in self._digest_of]
        if unknown or any(block in self._digest_of for block in self._free):
            raise RuntimeError(f"{self!r}: free and cached blocks are mixed up")

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._digest_of.pop(block)]
        return block


def _digest(data: bytes) -> Digest:
    # Long enough that nobody finds two prompts with the same one.
    return hashlib.blake2b(data, digest_size=16).digest()
