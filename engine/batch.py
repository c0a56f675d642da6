"""Turns a ``ScheduledBatch`` into tensors: the first ones on a request's path.

Shape letters: T tokens in the batch, B sequences, P blocks of the longest sequence,
R rows whose logits are wanted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.types import ScheduledBatch


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Where a step's tokens stand; passed to every layer, built anew for each step.

    The first ``num_decodes`` sequences have one token each; the others' tokens follow,
    sequence by sequence, ``query_lens`` each. ``slots_T`` is block * block size + offset,
    ``context_lens`` counts a sequence's tokens up to and with its last one here.
    """

    positions_T: Tensor
    slots_T: Tensor
    block_tables_BP: Tensor
    query_lens: list[int]
    context_lens: list[int]
    num_decodes: int


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """Token ids of a step, their context, and the rows whose logits are wanted."""

    token_ids_T: Tensor
    context: ForwardContext
    rows_R: Tensor


def build(batch: ScheduledBatch, block_size: int) -> ModelInputs:
    """Tensors for ``batch``; the i-th of ``rows_R`` belongs to the i-th item that samples."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    rows: list[int] = []
    for item in batch.items:
        sequence, start = item.sequence, item.sequence.computed
        end = start + item.length
        token_ids += sequence.tokens[start:end]
        positions += range(start, end)
        table = sequence.block_table
        slots += [table[p // block_size] * block_size + p % block_size for p in range(start, end)]
        if item.samples:
            rows.append(len(token_ids) - 1)
    lengths = [item.length for item in batch.items]
    context = ForwardContext(
        positions_T=torch.tensor(positions),
        slots_T=torch.tensor(slots),
        block_tables_BP=_pad([item.sequence.block_table for item in batch.items]),
        query_lens=lengths,
        context_lens=[item.sequence.computed + item.length for item in batch.items],
        num_decodes=next((i for i, n in enumerate(lengths) if n > 1), len(lengths)),
    )
    return ModelInputs(torch.tensor(token_ids), context, torch.tensor(rows, dtype=torch.long))


def _pad(tables: list[list[int]]) -> Tensor:
    width = max(len(table) for table in tables)
    return torch.tensor([table + [0] * (width - len(table)) for table in tables])
