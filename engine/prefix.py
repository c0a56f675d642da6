"""What of a sequence's tokens the prefix cache holds."""

from collections.abc import Iterable

from engine.block_manager import BlockManager
from engine.types import Sequence


def known_prefix(sequence: Sequence, blocks: BlockManager) -> list[int]:
    """Blocks that hold the sequence's beginning; one token at least is left to compute."""
    if sequence.request.sampling.prompt_logprobs is not None:
        return []  # they need the logits of every position
    blocks.extend_digests(sequence.digests, sequence.tokens, sequence.request.cache_salt)
    most = (len(sequence.tokens) - 1) // blocks.block_size
    return blocks.match(sequence.digests[:most])


def tokens_to_compute(sequences: Iterable[Sequence], blocks: BlockManager) -> int:
    """Of all together, one after the other: what one computes the next ones find."""
    tokens, seen = 0, set[bytes]()
    for sequence in sequences:
        tokens += sequence.uncomputed
        if not sequence.block_table:
            known = len(known_prefix(sequence, blocks))
            most = (len(sequence.tokens) - 1) // blocks.block_size
            found = known + sum(digest in seen for digest in sequence.digests[known:most])
            tokens -= found * blocks.block_size
        seen.update(sequence.digests)
    return tokens
