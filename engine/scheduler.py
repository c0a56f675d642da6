"""Continuous batching: decides which tokens of which sequences run in the next step.

Sequences are served by priority, then earliest deadline, then arrival. Running sequences decode
first; what is left of the step's token budget goes to prompts, in chunks that keep the gap
between two tokens of the others below ``max_gap_s``. When blocks run out, the sequence of the
lowest priority that loses least gives its blocks up and is computed again later, in its old
place (preemption by recompute, as in the vLLM paper); the one that has most always goes on, so
that there is no livelock. No tensors, no clock of its own.
"""

import bisect
from operator import attrgetter

from engine.block_manager import BlockManager
from engine.config import SchedulerConfig
from engine.counts import Counts
from engine.endings import ending, expiry, failure
from engine.errors import InvalidRequest
from engine.preemption import cheapest
from engine.prefix import known_prefix, tokens_to_compute
from engine.speculation import add_drafts
from engine.speed import StepSpeed
from engine.types import (
    EngineStats,
    Finished,
    FinishReason,
    Request,
    ScheduledBatch,
    ScheduledSequence,
    Sequence,
    StepOutput,
    StepResult,
    TokenLogprobs,
)

_order = attrgetter("order")


class Scheduler:
    """Owns the sequences from ``add`` until their ``Finished``; asks ``blocks`` for memory."""

    def __init__(self, config: SchedulerConfig, blocks: BlockManager, context_length: int) -> None:
        self._config = config
        self._blocks = blocks
        self._max_tokens = min(context_length, blocks.capacity_tokens)
        self._waiting: list[Sequence] = []  # both in the order of service
        self._running: list[Sequence] = []
        self._sequences: dict[str, list[Sequence]] = {}
        self._cancelled: list[tuple[str, int | None]] = []
        self._refused: list[Finished] = []
        self._step_began = 0.0
        self._speed = StepSpeed()
        self._counts = Counts()

    def __repr__(self) -> str:
        return f"<Scheduler waiting {len(self._waiting)} running {len(self._running)}>"

    @property
    def max_sequence_tokens(self) -> int:
        """The longest prompt and completion together that can run."""
        return self._max_tokens

    @property
    def has_work(self) -> bool:
        """Whether a step would do or report something."""
        return bool(self._sequences or self._refused)

    def add(self, request: Request, now: float = 0.0) -> None:
        """Queues a request. Raises ``InvalidRequest`` where it can never run.

        A deadline that cannot be met at the measured speeds gives a ``REFUSED`` in the next
        step.
        """
        wanted = len(request.prompt) + request.stopping.max_tokens
        if not request.prompt or request.stopping.max_tokens < 1 or request.choices < 1:
            raise InvalidRequest("input", "the prompt, max_tokens and n must not be empty")
        if request.id in self._sequences:
            raise InvalidRequest("request_id", "a request with this id is running")
        if wanted > self._max_tokens:
            raise InvalidRequest(
                "stopping.max_tokens",
                f"prompt and max_tokens make {wanted} tokens, at most {self._max_tokens} fit",
            )
        leader = Sequence(request, list(request.prompt))
        others = [
            Sequence(request, list(request.prompt), choice=i, leader=leader)
            for i in range(1, request.choices)
        ]
        self._sequences[request.id] = [leader, *others]
        for sequence in self._sequences[request.id]:
            bisect.insort(self._waiting, sequence, key=_order)
        self._refuse_if_hopeless(leader, now)

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Ends a request, or one choice, at the next step. Unknown ones are ignored: they may
        just have ended."""
        if request_id in self._sequences:
            self._cancelled.append((request_id, choice))

    def schedule(self, now: float) -> tuple[ScheduledBatch, list[Finished]]:
        """The next step's work, and what ended before it (cancelled, expired, refused)."""
        refused, self._refused = self._refused, []
        ended = refused + self._end_cancelled(now) + self._end_expired(now)
        self._step_began = now
        self._make_way()
        items: list[ScheduledSequence] = []
        for sequence in [s for s in self._running if s.uncomputed == 1]:
            if sequence in self._running and self._make_room(sequence, items):
                items.append(ScheduledSequence(sequence, 1))
        waits = bool(self._waiting)
        items = add_drafts(items, self._config, self._blocks, self._running, waits=waits)
        budget = self._prompt_budget(sum(item.rows for item in items))
        for sequence in [s for s in self._running if s.uncomputed > 1]:
            length = min(sequence.uncomputed, budget)
            if length > 0:
                items.append(ScheduledSequence(sequence, length))
                budget -= length
        self._admit(budget, now, items)
        return ScheduledBatch(items), ended

    def commit(self, batch: ScheduledBatch, result: StepResult, now: float) -> StepOutput:
        """Takes in the step's result; what it was measured to take is remembered."""
        output = StepOutput(prompts=result.prompts)
        for index, (item, token) in enumerate(zip(batch.items, result.tokens, strict=True)):
            sequence, samples = item.sequence, item.samples
            sequence.computed += item.length
            if not samples or token >= 0:  # nobody must find what gave logits that are not finite
                self._register_full_blocks(sequence)
            if samples:
                sequence.prompt_done = True
                logprobs = result.logprobs.get(index)
                if self._append(sequence, token, logprobs, now, output) and item.drafts:
                    self._accept(item, result.after_drafts[index], now, output)
        prompt_tokens = sum(item.length for item in batch.items if item.length > 1)
        each = len(output.tokens) / max(1, len(batch.items))
        self._speed.observe(now - self._step_began, prompt_tokens, each)
        return output

    def fail(self, batch: ScheduledBatch, message: str, now: float) -> list[Finished]:
        """Ends all sequences of a batch whose step failed."""
        error = FinishReason.ERROR
        return [self._finish(i.sequence, error, now, message=message) for i in batch.items]

    def stats(self) -> EngineStats:
        """Live counts."""
        return self._counts.stats(len(self._waiting), len(self._running), self._blocks)

    def check_invariants(self) -> None:
        """Raises ``RuntimeError`` where sequences or blocks are lost or held twice."""
        held = [*self._waiting, *self._running]
        owned = [sequence for group in self._sequences.values() for sequence in group]
        if len(set(held)) != len(held) or set(held) != set(owned):
            raise RuntimeError(f"{self!r}: queues and {len(owned)} sequences differ")
        if any(s.block_table or s.computed for s in self._waiting):
            raise RuntimeError(f"{self!r}: a waiting sequence holds blocks")
        for queue in (self._waiting, self._running):
            if queue != sorted(queue, key=_order):
                raise RuntimeError(f"{self!r}: a queue is out of order")
        self._blocks.check_invariants([s.block_table for s in self._running])

    def _refuse_if_hopeless(self, sequence: Sequence, now: float) -> None:
        request, deadline = sequence.request, sequence.request.stopping.deadline
        if deadline is None:
            return
        before = [s for s in self._waiting if s.order < sequence.order] + self._running
        if not before:
            return  # an idle engine tries: so a speed that was measured badly is measured anew
        # Other choices find the prompt of their first one computed.
        prompts = [s for s in before if s.uncomputed > 1 and s.leader is None]
        tokens = tokens_to_compute([*prompts, sequence], self._blocks)
        needed = self._speed.seconds_needed(request, tokens)
        if now + needed > deadline:
            message = f"needs {needed:.2f} s at the speed measured, more than its deadline leaves"
            self._refused += [
                self._finish(s, FinishReason.REFUSED, now, message=message, retry_after_s=needed)
                for s in list(self._sequences[request.id])
            ]

    def _end_cancelled(self, now: float) -> list[Finished]:
        cancelled, self._cancelled = self._cancelled, []
        ended = []
        for request_id, choice in cancelled:
            for sequence in list(self._sequences.get(request_id, ())):
                if choice is None or choice == sequence.choice:
                    ended.append(self._finish(sequence, FinishReason.CANCELLED, now))
        return ended

    def _end_expired(self, now: float) -> list[Finished]:
        ended = []
        for sequence in [s for group in self._sequences.values() for s in group]:
            if (expired := expiry(sequence, now)) is not None:
                reason, message = expired
                ended.append(self._finish(sequence, reason, now, message=message))
        return ended

    def _make_way(self) -> None:
        """The first in the queue may take the blocks of running ones of lower priority."""
        first = next((s for s in self._waiting if s.leader is None or s.leader.prompt_done), None)
        if first is None:
            return
        lower = [s for s in self._running if s.request.priority < first.request.priority]
        full = len(self._running) >= self._config.max_sequences
        while lower and (full or not self._fits(first)):
            victim = cheapest(lower)
            lower.remove(victim)
            self._preempt(victim)
            full = False

    def _make_room(self, sequence: Sequence, items: list[ScheduledSequence]) -> bool:
        """Grows the table by the next token; False if the sequence itself had to give way."""
        tokens = sequence.computed + 1
        while not self._blocks.can_grow(sequence.block_table, tokens):
            victim = cheapest(self._running)
            self._preempt(victim)
            items[:] = [item for item in items if item.sequence is not victim]
            if victim is sequence:
                return False
        self._blocks.grow(sequence.block_table, tokens)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self._running.remove(victim)
        self._blocks.release(victim.block_table)
        victim.preemptions += 1
        victim.recomputed += victim.computed
        self._counts.preempted += 1
        self._counts.recomputed += victim.computed
        victim.computed = victim.registered = 0
        bisect.insort(self._waiting, victim, key=_order)

    def _prompt_budget(self, decodes: int) -> int:
        budget = self._config.token_budget - decodes
        within = self._speed.prompt_tokens_within(self._config.max_gap_s)
        if decodes and within is not None:
            # However slow it is, prompts go on.
            budget = min(budget, max(within, self._blocks.block_size))
        return budget

    def _admit(self, budget: int, now: float, items: list[ScheduledSequence]) -> None:
        for sequence in list(self._waiting):
            if budget <= 0 or len(self._running) >= self._config.max_sequences:
                return
            if sequence.leader is not None and not sequence.leader.prompt_done:
                continue
            prefix = known_prefix(sequence, self._blocks)
            # The whole prompt must fit now, or its chunks would soon preempt each other.
            if not self._blocks.can_share_and_grow(prefix, len(sequence.tokens)):
                return
            self._start(sequence, prefix, now)
            length = min(sequence.uncomputed, budget)
            items.append(ScheduledSequence(sequence, length))
            budget -= length

    def _fits(self, sequence: Sequence) -> bool:
        return self._blocks.can_share_and_grow(
            known_prefix(sequence, self._blocks), len(sequence.tokens)
        )

    def _start(self, sequence: Sequence, prefix: list[int], now: float) -> None:
        self._waiting.remove(sequence)
        bisect.insort(self._running, sequence, key=_order)
        self._blocks.share(sequence.block_table, prefix)
        self._blocks.grow(sequence.block_table, len(sequence.tokens))
        sequence.registered = len(prefix)
        sequence.computed = len(prefix) * self._blocks.block_size
        if sequence.scheduled_at is None:
            sequence.scheduled_at = now
            sequence.cached = sequence.computed
            self._counts.prompt += len(sequence.request.prompt)
            self._counts.cached += sequence.computed

    def _register_full_blocks(self, sequence: Sequence) -> None:
        full = sequence.computed // self._blocks.block_size
        if full > sequence.registered:
            self._blocks.extend_digests(
                sequence.digests, sequence.tokens, sequence.request.cache_salt
            )
            for index in range(sequence.registered, full):
                self._blocks.register(sequence.block_table[index], sequence.digests[index])
            sequence.registered = full

    def _accept(
        self, item: ScheduledSequence, sampled: list[int], now: float, output: StepOutput
    ) -> None:
        """Appends what was sampled after each draft that was right."""
        sequence, accepted = item.sequence, 0
        for draft, token in zip(item.drafts, sampled, strict=True):
            if draft != sequence.tokens[-1]:
                break
            accepted += 1
            sequence.computed += 1
            if token >= 0:
                self._register_full_blocks(sequence)
            if not self._append(sequence, token, None, now, output):
                break
        self._counts.drafted += len(item.drafts)
        self._counts.accepted += accepted
        sequence.drafter.judge(len(item.drafts), accepted, len(sequence.tokens))

    def _append(
        self,
        sequence: Sequence,
        token: int,
        logprobs: TokenLogprobs | None,
        now: float,
        output: StepOutput,
    ) -> bool:
        """Whether the sequence goes on."""
        if token < 0:
            reason, message = failure(token)
            output.finished.append(self._finish(sequence, reason, now, message=message))
            return False
        sequence.tokens.append(token)
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        self._counts.generated += 1
        output.tokens.append(sequence.last_token(logprobs))
        end = ending(sequence)
        if end is not None:
            stop = None if end is FinishReason.LENGTH else token
            output.finished.append(self._finish(sequence, end, now, stop=stop))
        return end is None

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        now: float,
        *,
        stop: int | None = None,
        message: str = "",
        retry_after_s: float = 1.0,
    ) -> Finished:
        group = self._sequences[sequence.id]
        group.remove(sequence)
        if not group:
            del self._sequences[sequence.id]
        elif sequence.leader is None and not sequence.prompt_done:
            # The next choice computes the prompt for the others.
            for other in group:
                other.leader = None if other is group[0] else group[0]
        queue = self._running if sequence in self._running else self._waiting
        queue.remove(sequence)
        self._blocks.release(sequence.block_table)
        return sequence.end(reason, now, stop=stop, message=message, retry_after_s=retry_after_s)
