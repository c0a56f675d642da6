"""Random traffic through the core, against an oracle that knows every request's tokens.

The runner keeps a paper KV cache and computes from what the block tables lead to, so that a
block lost, shared or left stale shows as a wrong token.
"""

import random
from dataclasses import dataclass, field

import pytest

from engine.config import SchedulerConfig
from engine.core import EngineCore
from engine.testing import ArithmeticRunner
from engine.types import (
    FinishReason,
    Request,
    SamplingParams,
    ScheduledBatch,
    StepOutput,
    StoppingParams,
)

STEPS = 260


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """A pool, a step's bounds, and how much comes: requests a step, and shares of them."""

    blocks: int
    block_size: int
    max_sequences: int
    token_budget: int
    load: float
    cancels: float = 0.15
    limits: float = 0.15
    faults: float = 0.0


class PaperRunner(ArithmeticRunner):
    """Reads the tokens before the next one from its cache, not from the sequence."""

    def __init__(self, traffic: Traffic, draw: random.Random) -> None:
        super().__init__(traffic.blocks, traffic.block_size, context_length=64)
        self._traffic = traffic
        self._draw = draw
        self._cache: dict[int, int] = {}
        self.failed: set[str] = set()
        self.problem: AssertionError | None = None

    def run(self, batch: ScheduledBatch) -> list[int]:
        self.steps.append(batch)
        try:
            self._check(batch)
        except AssertionError as error:  # the core would take it for a failed step
            self.problem = error
            raise
        ids = [item.sequence.id for item in batch.items]
        if self._draw.random() < self._traffic.faults / 2:
            self.failed |= set(ids)
            raise RuntimeError("a step that fails")
        tokens = []
        for item in batch.items:
            sequence, end = item.sequence, item.sequence.computed + item.length
            for position in range(sequence.computed, end):
                slot = self._slot(sequence.block_table, position)
                self._cache[slot] = sequence.tokens[position]
            cached = [self._cache[self._slot(sequence.block_table, p)] for p in range(end)]
            tokens.append(self.next_token(cached) if item.samples else 0)
        if self._draw.random() < self._traffic.faults / 2:
            broken = self._draw.randrange(len(ids))
            if batch.items[broken].samples:
                self.failed.add(ids[broken])
                tokens[broken] = -1
        return tokens

    def _slot(self, table: list[int], position: int) -> int:
        return table[position // self.block_size] * self.block_size + position % self.block_size

    def _check(self, batch: ScheduledBatch) -> None:
        ids = [item.sequence.id for item in batch.items]
        blocks = [block for item in batch.items for block in item.sequence.block_table]
        assert len(set(ids)) == len(ids) <= self._traffic.max_sequences
        assert len(set(blocks)) == len(blocks)
        assert all(0 <= block < self.num_blocks for block in blocks)
        assert sum(item.length for item in batch.items) <= self._traffic.token_budget
        assert all(item.length >= 1 for item in batch.items)
        decoding = [
            s.generated > 0 and s.uncomputed == 1 for s in (i.sequence for i in batch.items)
        ]
        chunks = [item.sequence.uncomputed > 1 for item in batch.items]
        assert not any(chunks[n] and any(decoding[n:]) for n in range(len(chunks)))


@dataclass(slots=True)
class Oracle:
    """What was asked for and what came."""

    runner: PaperRunner
    requests: dict[str, Request] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    reasons: dict[str, FinishReason] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)

    def open(self) -> list[str]:
        return [name for name in self.requests if name not in self.reasons]

    def take(self, output: StepOutput, now: float) -> None:
        for event in output.tokens:
            assert event.id not in self.reasons, "a token after the end"
            self.tokens[event.id].append(event.token)
        for finished in output.finished:
            assert finished.id in self.requests
            assert finished.id not in self.reasons, "two ends"
            self.reasons[finished.id] = finished.reason
            self._check(finished.id, now)

    def _check(self, name: str, now: float) -> None:
        stopping = self.requests[name].stopping
        found, reason = self.tokens[name], self.reasons[name]
        whole = self.runner.expected(self.requests[name].prompt, stopping.max_tokens)
        ends = {*stopping.stop_token_ids, *stopping.eos_token_ids}
        natural = next((n for n, token in enumerate(whole, 1) if token in ends), len(whole))
        assert found == whole[: len(found)]
        assert len(found) <= natural
        match reason:
            case FinishReason.LENGTH:
                assert (found, natural) == (whole, stopping.max_tokens)
            case FinishReason.EOS:
                assert len(found) == natural
                assert found[-1] in stopping.eos_token_ids
            case FinishReason.STOP:
                assert len(found) == natural
                assert found[-1] in stopping.stop_token_ids
            case FinishReason.CANCELLED:
                assert name in self.cancelled
            case FinishReason.DEADLINE:
                assert stopping.deadline is not None
                assert now >= stopping.deadline
            case FinishReason.TIME_LIMIT:
                assert stopping.time_limit is not None
                assert now >= stopping.time_limit
            case FinishReason.ERROR:
                assert name in self.runner.failed


def make_request(
    number: int, now: float, most: int, traffic: Traffic, draw: random.Random
) -> Request:
    """Mostly short, sometimes as long as the pool allows."""
    room = most if draw.random() < 0.2 else min(most, 12)
    prompt = draw.randint(1, max(1, room - 1))
    limits: dict[str, float] = {}
    if draw.random() < traffic.limits:
        limits[draw.choice(["deadline", "time_limit"])] = now + draw.randint(0, 20)
    return Request(
        id=str(number),
        prompt=[draw.randint(1, 96) for _ in range(prompt)],
        sampling=SamplingParams(),
        stopping=StoppingParams(
            max_tokens=draw.randint(1, room - prompt) if room > prompt else 1,
            stop_token_ids=tuple(draw.sample(range(1, 97), draw.choice([0, 0, 2]))),
            eos_token_ids=tuple(draw.sample(range(1, 97), draw.choice([0, 0, 2]))),
            **limits,
        ),
        arrival=now + draw.random() / 2,
    )


SMALL = Traffic(blocks=8, block_size=4, max_sequences=4, token_budget=8, load=0.5)
TRAFFIC = {
    "small": SMALL,
    "crowded": Traffic(blocks=8, block_size=4, max_sequences=8, token_budget=8, load=2.0),
    "one at a time": Traffic(blocks=8, block_size=4, max_sequences=1, token_budget=1, load=0.1),
    "tokens as blocks": Traffic(blocks=32, block_size=1, max_sequences=6, token_budget=7, load=0.8),
    "roomy": Traffic(blocks=64, block_size=4, max_sequences=16, token_budget=64, load=2.0),
    "uneven": Traffic(blocks=11, block_size=3, max_sequences=5, token_budget=32, load=0.8),
    "faulty": Traffic(
        blocks=8, block_size=4, max_sequences=4, token_budget=16, load=0.8, faults=0.2
    ),
    "nobody gives up": Traffic(
        blocks=8, block_size=4, max_sequences=8, token_budget=32, load=0.6, cancels=0, limits=0
    ),
}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", TRAFFIC)
def test_every_request_gets_its_own_tokens_and_one_end(name: str, seed: int) -> None:
    traffic, draw = TRAFFIC[name], random.Random(f"{name} {seed}")
    runner = PaperRunner(traffic, draw)
    oracle = Oracle(runner)
    now = 0.0
    config = SchedulerConfig(max_sequences=traffic.max_sequences, token_budget=traffic.token_budget)
    core = EngineCore(runner, config, lambda: now)
    most = core.report().max_sequence_tokens

    def step() -> None:
        nonlocal now
        now += 1.0
        ran, busy = len(runner.steps), core.has_work
        output = core.step()
        if runner.problem is not None:
            raise runner.problem
        assert bool(output.finished) or len(runner.steps) > ran or not busy, "a step for nothing"
        oracle.take(output, now)
        core._scheduler.check_invariants()
        stats = core.stats()
        assert stats.queued + stats.running == len(oracle.open())
        assert stats.blocks_used + stats.blocks_free == traffic.blocks

    for _ in range(STEPS):
        while draw.random() < traffic.load / (1 + traffic.load) and len(oracle.open()) < 60:
            request = make_request(len(oracle.requests), now, most, traffic, draw)
            core.submit(request)
            oracle.requests[request.id], oracle.tokens[request.id] = request, []
        if oracle.open() and draw.random() < traffic.cancels:
            victim = draw.choice(oracle.open())
            oracle.cancelled.add(victim)
            core.cancel(victim)
        step()

    # Nobody starves: what is left takes no more steps than if it ran one after the other,
    # each token in a step of its own, and each preempted sequence once again.
    patience = 2 * sum(
        len(oracle.requests[left].prompt) + oracle.requests[left].stopping.max_tokens
        for left in oracle.open()
    )
    for _ in range(patience):
        if not core.has_work:
            break
        step()
    assert not oracle.open()
    assert core.stats().blocks_free == traffic.blocks
    assert len(oracle.requests) > 10


def test_the_traffic_is_worth_the_name() -> None:
    """The simulation reaches preemption, chunks and every reason; else it would prove little."""
    traffic, draw = SMALL, random.Random(0)
    runner = PaperRunner(traffic, draw)
    core = EngineCore(runner, SchedulerConfig(max_sequences=4, token_budget=8), lambda: 0.0)
    for number in range(40):
        core.submit(make_request(number, 1e9, 32, traffic, draw))
    reasons = set()
    while core.has_work:
        reasons |= {finished.reason for finished in core.step().finished}
    chunks = [item for batch in runner.steps for item in batch.items if not item.samples]
    assert core.stats().preemptions > 3
    assert len(chunks) > 3
    assert {FinishReason.LENGTH, FinishReason.EOS, FinishReason.STOP} <= reasons
