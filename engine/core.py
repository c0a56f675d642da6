"""The engine's heart: a step is schedule, run, commit. Knows token ids, no text, no gRPC."""

import logging
import time
from collections.abc import Callable
from typing import Protocol

from engine.block_manager import BlockManager
from engine.config import EngineConfig, SchedulerConfig
from engine.loader import Progress
from engine.model_runner import ModelRunner
from engine.scheduler import Scheduler
from engine.types import (
    EngineStats,
    ModelReport,
    Request,
    ScheduledBatch,
    StepOutput,
    StepResult,
)

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """What computes a batch; ``ModelRunner``, or a fake with tokens known by hand."""

    block_size: int
    num_blocks: int

    @property
    def context_length(self) -> int:
        """Positions that the model knows."""
        ...

    def run(self, batch: ScheduledBatch) -> StepResult:
        """Computes a step."""
        ...

    def report(self, max_sequence_tokens: int) -> ModelReport:
        """What is in memory."""
        ...


class EngineCore:
    """Not thread-safe: one thread submits, cancels and steps."""

    def __init__(
        self,
        runner: Runner,
        config: SchedulerConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._clock = clock
        blocks = BlockManager(runner.num_blocks, runner.block_size)
        self._scheduler = Scheduler(config, blocks, runner.context_length)

    @classmethod
    def from_config(
        cls, config: EngineConfig, progress: Progress = lambda item, items: None
    ) -> "EngineCore":
        """Loads the model. Raises ``ModelLoadError``."""
        return cls(ModelRunner.from_config(config, progress), config.scheduler)

    @property
    def has_work(self) -> bool:
        """Whether ``step`` would do something."""
        return self._scheduler.has_work

    def report(self) -> ModelReport:
        """The model as found in memory."""
        return self._runner.report(self._scheduler.max_sequence_tokens)

    def stats(self) -> EngineStats:
        """Live counts."""
        return self._scheduler.stats()

    def submit(self, request: Request) -> None:
        """Accepts a request, each choice of which ends with exactly one ``Finished``; or raises."""
        self._scheduler.add(request, self._clock())

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Ends a request, or one of its choices, within a step. Unknown ids are ignored."""
        self._scheduler.cancel(request_id, choice)

    def step(self) -> StepOutput:
        """Schedules, runs and commits one batch. A failing batch ends its own requests only."""
        batch, ended = self._scheduler.schedule(self._clock())
        output = StepOutput()
        if batch:
            try:
                result = self._runner.run(batch)
            except Exception:
                ids = [item.sequence.id for item in batch.items]
                logger.exception("a step failed with requests %s", ids)
                message = "the engine could not compute a step"
                output.finished.extend(self._scheduler.fail(batch, message, self._clock()))
            else:
                output = self._scheduler.commit(batch, result, self._clock())
        if not self.has_work:
            self._scheduler.check_invariants()
        return StepOutput(output.prompts, output.tokens, ended + output.finished)
