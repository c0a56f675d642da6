"""Turns a ``ScheduledBatch`` into tensors: the first ones on a request's path.

Shape letters: T tokens in the batch, B sequences of a group, P blocks of its longest one,
R rows whose logits are wanted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.types import ScheduledBatch, ScheduledSequence


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Neighbouring sequences with as many tokens each, attended to in one call.

    Theirs are the batch's rows from ``begin``: ``count`` sequences of ``length`` tokens.
    ``context_lens_B`` counts a sequence's tokens up to and with its last one here; the block
    tables are cut and padded to the longest of them.
    """

    begin: int
    count: int
    length: int
    block_tables_BP: Tensor
    context_lens_B: Tensor


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Where a step's tokens stand; passed to every layer, built anew for each step.

    ``slots_T`` is block * block size + offset; ``groups`` cover all tokens in their order.
    The same for kernels that take the whole batch, in int32: a row of ``sequences_B4`` is a
    sequence's first token here, its tokens here, its tokens up to and with the last of them,
    and where its blocks begin in ``block_ids_P``.
    """

    positions_T: Tensor
    slots_T: Tensor
    groups: list[AttentionGroup]
    sequences_B4: Tensor
    block_ids_P: Tensor


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """Token ids of a step, their context, and the rows whose logits are wanted."""

    token_ids_T: Tensor
    context: ForwardContext
    rows_R: Tensor


def build(batch: ScheduledBatch, block_size: int) -> ModelInputs:
    """Tensors for ``batch``; ``rows_R`` are those of the items that sample, drafts with them."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    rows: list[int] = []
    sequences: list[tuple[int, int, int, int]] = []
    block_ids: list[int] = []
    for item in batch.items:
        sequence, start = item.sequence, item.sequence.computed
        end = start + item.rows
        sequences.append((len(token_ids), item.rows, end, len(block_ids)))
        block_ids += sequence.block_table[: -(-end // block_size)]
        token_ids += sequence.tokens[start : start + item.length]
        token_ids += item.drafts
        positions += range(start, end)
        table = sequence.block_table
        slots += [table[p // block_size] * block_size + p % block_size for p in range(start, end)]
        if item.samples:
            rows += range(len(token_ids) - 1 - len(item.drafts), len(token_ids))
    context = ForwardContext(
        positions_T=torch.tensor(positions),
        slots_T=torch.tensor(slots),
        groups=_groups(batch.items, block_size),
        sequences_B4=torch.tensor(sequences, dtype=torch.int32),
        block_ids_P=torch.tensor(block_ids, dtype=torch.int32),
    )
    return ModelInputs(torch.tensor(token_ids), context, torch.tensor(rows, dtype=torch.long))


def _groups(items: list[ScheduledSequence], block_size: int) -> list[AttentionGroup]:
    """Decodes in groups that padding at most doubles, chunks of prompts and drafts one by one."""
    groups: list[AttentionGroup] = []
    members: list[list[int]] = []
    lens: list[int] = []
    row = 0

    def close(length: int) -> None:
        nonlocal row, members, lens
        if members:
            width = max(map(len, members))
            tables = torch.tensor([table + [0] * (width - len(table)) for table in members])
            groups.append(AttentionGroup(row, len(members), length, tables, torch.tensor(lens)))
            row += len(members) * length
            members, lens = [], []

    for item in items:
        context = item.sequence.computed + item.rows
        table = item.sequence.block_table[: -(-context // block_size)]
        if item.rows > 1 or not _padding_is_small([*members, table]):
            close(1)
        members.append(table)
        lens.append(context)
        if item.rows > 1:
            close(item.rows)
    close(1)
    return groups


def _padding_is_small(tables: list[list[int]]) -> bool:
    widths = [len(table) for table in tables]
    return len(widths) * max(widths) <= 2 * sum(widths)
