"""Speculative decoding: which sequences of a step get drafts, and how many.

The model checks a draft in the same step as the token before it: it is accepted while it
equals what is sampled there, so that the output is the same with and without.
"""

from dataclasses import replace

from engine.block_manager import BlockManager
from engine.config import SchedulerConfig
from engine.types import ScheduledSequence, Sequence

# Beyond so many rows a step is no longer bound by reading the weights, and drafts are not free.
_MOST_ROWS = 16


def add_drafts(
    decodes: list[ScheduledSequence],
    config: SchedulerConfig,
    blocks: BlockManager,
    running: list[Sequence],
    *,
    waits: bool,
) -> list[ScheduledSequence]:
    """``decodes``, of one token each, with drafts within the step's bounds.

    Drafts never take blocks that one of the ``running`` sequences may need for its next token,
    and while a prompt is computed or ``waits``, not all of the budget.
    """
    prompts = waits or any(sequence.uncomputed > 1 for sequence in running)
    budget = config.token_budget - (blocks.block_size if prompts else 0)
    rows = min(_MOST_ROWS, budget) - len(decodes)
    if config.speculative_tokens < 1 or rows < 1:
        return decodes
    items: list[ScheduledSequence] = []
    for item in decodes:
        sequence = item.sequence
        left = sequence.request.stopping.max_tokens - sequence.generated - 1
        room = min(config.speculative_tokens, rows, left) if _may_be_drafted(sequence) else 0
        drafts = sequence.drafter.draft(sequence.tokens, room)
        tokens = len(sequence.tokens) + len(drafts)
        missing = blocks.missing_blocks(sequence.block_table, tokens)
        if drafts and missing + len(running) <= blocks.available_blocks:
            blocks.grow(sequence.block_table, tokens)
            rows -= len(drafts)
            items.append(replace(item, drafts=tuple(drafts)))
        else:
            items.append(item)
    return items


def _may_be_drafted(sequence: Sequence) -> bool:
    """Whether its next tokens are sampled independently of the tokens just before them."""
    sampling = sequence.request.sampling
    return (
        sampling.constraint is None
        and sampling.logprobs is None
        and sampling.repetition_penalty == 1.0
        and sampling.presence_penalty == sampling.frequency_penalty == 0.0
        and sequence.generated >= sequence.request.stopping.min_tokens
    )
