"""The engine's heart: a step is schedule, run, commit. Knows token ids, no text, no gRPC."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from engine.block_manager import BlockManager
from engine.config import EngineConfig, SchedulerConfig
from engine.errors import InvalidRequest
from engine.loader import Progress
from engine.model_runner import ModelRunner
from engine.preparation import Preparation, Prepared
from engine.scheduler import Scheduler
from engine.types import (
    Constraint,
    EngineStats,
    Finished,
    FinishReason,
    ModelReport,
    Request,
    ScheduledBatch,
    StepOutput,
    StepResult,
)

logger = logging.getLogger(__name__)

# How long a step without work waits for a request that is being prepared.
_PREPARATION_S = 0.005


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

    def prepare(self, constraint: Constraint) -> object:
        """Compiles a constraint; may be called in any thread. Raises ``InvalidRequest``."""
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
        self._preparation = Preparation(runner.prepare, clock)
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
        return self._scheduler.has_work or len(self._preparation) > 0

    def report(self) -> ModelReport:
        """The model as found in memory."""
        return self._runner.report(self._scheduler.max_sequence_tokens)

    def stats(self) -> EngineStats:
        """Live counts."""
        stats = self._scheduler.stats()
        return replace(stats, queued=stats.queued + len(self._preparation))

    def submit(self, request: Request) -> None:
        """Accepts a request, each choice of which ends with exactly one ``Finished``; or raises."""
        if request.id in self._preparation:
            raise InvalidRequest("request_id", "a request with this id is running")
        constraint = request.sampling.constraint
        if constraint is None:
            self._scheduler.add(request, self._clock())
        else:
            self._preparation.add(request, constraint)

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Ends a request, or one of its choices, within a step. Unknown ids are ignored.

        One whose constraint is being compiled ends when that is done.
        """
        self._preparation.cancel(request_id, choice)
        self._scheduler.cancel(request_id, choice)

    def step(self) -> StepOutput:
        """Schedules, runs and commits one batch. A failing batch ends its own requests only."""
        refused = [end for prepared in self._preparation.take() for end in self._go_on(prepared)]
        batch, ended = self._scheduler.schedule(self._clock())
        output, figures = StepOutput(), None
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
                figures = result.figures
        elif self._preparation:
            self._preparation.wait(_PREPARATION_S)
        if not self.has_work:
            self._scheduler.check_invariants()
        finished = refused + ended + output.finished
        return StepOutput(output.prompts, output.tokens, finished, figures)

    def _go_on(self, prepared: Prepared) -> list[Finished]:
        request, error = prepared.request, prepared.error
        if not error:
            try:
                self._scheduler.add(request, self._clock())
            except InvalidRequest as refusal:
                error = str(refusal)
        for choice in prepared.cancelled:
            self._scheduler.cancel(request.id, choice)
        return [
            Finished(
                id=request.id,
                reason=FinishReason.INVALID,
                choice=choice,
                scheduled_at=None,
                first_token_at=None,
                finished_at=self._clock(),
                message=error,
            )
            for choice in range(request.choices if error else 0)
        ]
