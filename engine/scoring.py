"""Logits of given tokens, through the same layers, kernels and KV pages that serve."""

from types import TracebackType

import torch
from torch import Tensor

from engine.block_manager import BlockManager
from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from engine.types import (
    ModelReport,
    Request,
    SamplingParams,
    ScheduledBatch,
    ScheduledSequence,
    Sequence,
    StoppingParams,
)


class Scorer:
    """A model for teacher forcing. One sequence at a time, in chunks of the token budget."""

    def __init__(self, config: EngineConfig) -> None:
        self._runner = ModelRunner.from_config(config)
        self._blocks = BlockManager(self._runner.num_blocks, self._runner.block_size)
        self._chunk = config.scheduler.token_budget

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del self._runner

    @property
    def report(self) -> ModelReport:
        """The model as found in memory."""
        most = min(self._runner.context_length, self._blocks.capacity_tokens)
        return self._runner.report(most)

    def logits(self, token_ids: list[int]) -> Tensor:
        """float32 [T, V]: row i predicts token i + 1. Raises ``ValueError`` on a wrong length."""
        if not 1 <= len(token_ids) <= self.report.max_sequence_tokens:
            most = self.report.max_sequence_tokens
            raise ValueError(f"score 1 to {most} tokens at once, not {len(token_ids)}")
        sequence = Sequence(_request(token_ids), list(token_ids))
        self._blocks.grow(sequence.block_table, len(token_ids))
        try:
            parts = []
            while sequence.uncomputed:
                item = ScheduledSequence(sequence, min(sequence.uncomputed, self._chunk))
                parts.append(self._runner.logits(ScheduledBatch([item])))
                sequence.computed += item.length
            return torch.cat(parts)
        finally:
            self._blocks.release(sequence.block_table)


def _request(token_ids: list[int]) -> Request:
    return Request(
        id="score",
        prompt=token_ids,
        sampling=SamplingParams(),
        stopping=StoppingParams(max_tokens=1),
        arrival=0.0,
    )
