"""Continuous batching: decides which tokens of which sequences run in the next step.

First come, first served. Running sequences decode first; what is left of the step's token
budget goes to prompts, in chunks. When blocks run out, the youngest running sequence gives
its blocks up and is computed again later (preemption by recompute, as in the vLLM paper);
the oldest always goes on, so that there is no livelock. No tensors, no clock of its own.
"""

from collections import deque

from engine.block_manager import BlockManager
from engine.config import SchedulerConfig
from engine.errors import InvalidRequest
from engine.types import (
    EngineStats,
    Finished,
    FinishReason,
    Request,
    ScheduledBatch,
    ScheduledSequence,
    Sequence,
    StepOutput,
    TokenEvent,
)


class Scheduler:
    """Owns the sequences from ``add`` until their ``Finished``; asks ``blocks`` for memory."""

    def __init__(self, config: SchedulerConfig, blocks: BlockManager, context_length: int) -> None:
        self._config = config
        self._blocks = blocks
        self._max_tokens = min(context_length, blocks.capacity_tokens)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in order of arrival
        self._sequences: dict[str, Sequence] = {}
        self._cancelled: list[str] = []
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._preemptions = 0

    def __repr__(self) -> str:
        return f"<Scheduler waiting {len(self._waiting)} running {len(self._running)}>"

    @property
    def max_sequence_tokens(self) -> int:
        """The longest prompt and completion together that can run."""
        return self._max_tokens

    @property
    def has_work(self) -> bool:
        """Whether a step would do or report something."""
        return bool(self._sequences)

    def add(self, request: Request) -> None:
        """Queues a request. Raises ``InvalidRequest`` where it can never run."""
        wanted = len(request.prompt) + request.stopping.max_tokens
        if not request.prompt or request.stopping.max_tokens < 1:
            raise InvalidRequest("input", "the prompt and max_tokens must not be empty")
        if request.id in self._sequences:
            raise InvalidRequest("request_id", "a request with this id is running")
        if wanted > self._max_tokens:
            raise InvalidRequest(
                "stopping.max_tokens",
                f"prompt and max_tokens make {wanted} tokens, at most {self._max_tokens} fit",
            )
        sequence = Sequence(request, list(request.prompt))
        self._sequences[request.id] = sequence
        self._waiting.append(sequence)

    def cancel(self, request_id: str) -> None:
        """Ends a request at the next step. Unknown ids are ignored: it may just have ended."""
        if request_id in self._sequences:
            self._cancelled.append(request_id)

    def schedule(self, now: float) -> tuple[ScheduledBatch, list[Finished]]:
        """The next step's work, and the requests that ended before it (cancelled, expired)."""
        ended = self._end_cancelled(now) + self._end_expired(now)
        budget = self._config.token_budget
        items: list[ScheduledSequence] = []
        # Decodes (one token each) before prompt chunks; each group in order of arrival.
        for sequence in sorted(self._running, key=lambda s: s.uncomputed > 1):
            if sequence in self._running:  # not preempted by one before it
                budget -= self._schedule_running(sequence, budget, items)
        self._admit(budget, now, items)
        return ScheduledBatch(items), ended

    def commit(self, batch: ScheduledBatch, tokens: list[int], now: float) -> StepOutput:
        """Takes in the step's result: ``tokens[i]`` for item i where it samples, else ignored.

        A negative token says that the row's logits were not finite.
        """
        output = StepOutput()
        for item, token in zip(batch.items, tokens, strict=True):
            sequence, samples = item.sequence, item.samples
            sequence.computed += item.length
            if samples:
                self._append(sequence, token, now, output)
        return output

    def fail(self, batch: ScheduledBatch, message: str, now: float) -> list[Finished]:
        """Ends all sequences of a batch whose step failed."""
        error = FinishReason.ERROR
        return [self._finish(i.sequence, error, now, message=message) for i in batch.items]

    def stats(self) -> EngineStats:
        """Live counts."""
        return EngineStats(
            queued=len(self._waiting),
            running=len(self._running),
            blocks_used=self._blocks.num_blocks - self._blocks.free_blocks,
            blocks_free=self._blocks.free_blocks,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self._preemptions,
        )

    def check_invariants(self) -> None:
        """Raises ``RuntimeError`` where sequences or blocks are lost or held twice."""
        held = {s.id for s in self._waiting} | {s.id for s in self._running}
        if held != set(self._sequences) or len(held) != len(self._waiting) + len(self._running):
            raise RuntimeError(f"{self!r}: queues and {len(self._sequences)} sequences differ")
        if any(s.block_table or s.computed for s in self._waiting):
            raise RuntimeError(f"{self!r}: a waiting sequence holds blocks")
        self._blocks.check_invariants([s.block_table for s in self._running])

    def _end_cancelled(self, now: float) -> list[Finished]:
        cancelled, self._cancelled = self._cancelled, []
        alive = [self._sequences[i] for i in dict.fromkeys(cancelled) if i in self._sequences]
        return [self._finish(s, FinishReason.CANCELLED, now) for s in alive]

    def _end_expired(self, now: float) -> list[Finished]:
        ended = []
        for sequence in list(self._sequences.values()):
            stopping = sequence.request.stopping
            if stopping.deadline is not None and now >= stopping.deadline:
                ended.append(self._finish(sequence, FinishReason.DEADLINE, now))
            elif stopping.time_limit is not None and now >= stopping.time_limit:
                ended.append(self._finish(sequence, FinishReason.TIME_LIMIT, now))
        return ended

    def _schedule_running(
        self, sequence: Sequence, budget: int, items: list[ScheduledSequence]
    ) -> int:
        length = min(sequence.uncomputed, budget)
        if length == 0 or not self._make_room(sequence, sequence.computed + length, items):
            return 0
        items.append(ScheduledSequence(sequence, length))
        return length

    def _make_room(self, sequence: Sequence, tokens: int, items: list[ScheduledSequence]) -> bool:
        """Grows the table, preempting younger sequences; False if itself had to give way."""
        scheduled = {item.sequence.id for item in items}
        while not self._blocks.can_grow(sequence.block_table, tokens):
            # Those that this step already runs keep their blocks.
            victim = next(s for s in reversed(self._running) if s.id not in scheduled)
            self._preempt(victim)
            if victim is sequence:
                return False
        self._blocks.grow(sequence.block_table, tokens)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self._running.remove(victim)
        self._blocks.release(victim.block_table)
        victim.computed = 0
        victim.preemptions += 1
        self._preemptions += 1
        self._waiting.appendleft(victim)

    def _admit(self, budget: int, now: float, items: list[ScheduledSequence]) -> None:
        while self._waiting and budget > 0 and len(self._running) < self._config.max_sequences:
            sequence = self._waiting[0]
            # The whole prompt must fit now, or its chunks would soon preempt each other.
            if not self._blocks.can_grow(sequence.block_table, len(sequence.tokens)):
                return
            self._waiting.popleft()
            length = min(sequence.uncomputed, budget)
            self._blocks.grow(sequence.block_table, len(sequence.tokens))
            if sequence.scheduled_at is None:
                sequence.scheduled_at = now
                self._prompt_tokens += len(sequence.request.prompt)
            self._running.append(sequence)
            self._running.sort(key=lambda s: s.request.arrival)
            items.append(ScheduledSequence(sequence, length))
            budget -= length

    def _append(self, sequence: Sequence, token: int, now: float, output: StepOutput) -> None:
        if token < 0:
            message = "the model's logits are not finite"
            output.finished.append(self._finish(sequence, FinishReason.ERROR, now, message=message))
            return
        sequence.tokens.append(token)
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        self._generated_tokens += 1
        output.tokens.append(TokenEvent(id=sequence.id, token=token))
        stopping = sequence.request.stopping
        if token in stopping.eos_token_ids:
            output.finished.append(self._finish(sequence, FinishReason.EOS, now, stop=token))
        elif token in stopping.stop_token_ids:
            output.finished.append(self._finish(sequence, FinishReason.STOP, now, stop=token))
        elif sequence.generated >= stopping.max_tokens:
            output.finished.append(self._finish(sequence, FinishReason.LENGTH, now))

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        now: float,
        *,
        stop: int | None = None,
        message: str = "",
    ) -> Finished:
        del self._sequences[sequence.id]
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._blocks.release(sequence.block_table)
        return Finished(
            id=sequence.id,
            reason=reason,
            scheduled_at=sequence.scheduled_at,
            first_token_at=sequence.first_token_at,
            finished_at=now,
            preemptions=sequence.preemptions,
            stop_token_id=stop,
            message=message,
        )
