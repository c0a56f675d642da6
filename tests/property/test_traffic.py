"""Random traffic through the core, against an oracle that knows every choice's tokens.

The runner keeps a paper KV cache and computes from what the block tables lead to, so that a
block lost, shared wrongly, revived with other contents or left stale shows as a wrong token.
"""

import random
import zlib
from collections import Counter
from dataclasses import dataclass, field

import pytest

from engine.config import SchedulerConfig
from engine.core import EngineCore
from engine.testing import ArithmeticRunner
from engine.types import (
    Finished,
    FinishReason,
    Request,
    SamplingParams,
    ScheduledBatch,
    ScheduledSequence,
    Sequence,
    StepOutput,
    StepResult,
    StoppingParams,
)

STEPS = 600
SEEDS = 3
MOST_OPEN = 40

# A choice of a request.
Key = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """A pool, a step's bounds and time, and what comes: requests a step, and shares of them."""

    blocks: int = 8
    block_size: int = 4
    max_sequences: int = 4
    token_budget: int = 8
    max_gap_s: float = 0.1
    decode_s: float = 0.0
    prompt_token_s: float = 0.0
    load: float = 0.5
    cancels: float = 0.15
    limits: float = 0.3
    faults: float = 0.0
    several: float = 0.25
    families: int = 3
    priorities: int = 3
    drafts: int = 0
    vocabulary: int = 97


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True, slots=True)
class Paper:
    """KV of a position: it depends on the token, and on all KV before it."""

    token: int
    before: int
    salt: str


class PaperRunner(ArithmeticRunner):
    """Reads the tokens before the next one from its cache, not from the sequence."""

    def __init__(self, traffic: Traffic, draw: random.Random, clock: Clock) -> None:
        super().__init__(traffic.blocks, traffic.block_size, context_length=64)
        self.vocabulary_size = traffic.vocabulary
        self._traffic = traffic
        self._draw = draw
        self._clock = clock
        self._cache: dict[int, Paper] = {}
        self._last: dict[Sequence, int] = {}
        self.failed: set[Key] = set()
        self.seen: Counter[str] = Counter()
        self.problem: Exception | None = None
        self.ran = 0

    def next_token(self, tokens: list[int]) -> int:
        # So that where the vocabulary is small, drafts are right now and then.
        return 1 + zlib.crc32(bytes(tokens)) % (self.vocabulary_size - 1)

    def run(self, batch: ScheduledBatch) -> StepResult:
        self.ran += 1
        lengths = [item.length for item in batch.items]
        prompt_tokens = sum(n for n in lengths if n > 1)
        self._clock.now += self._traffic.decode_s + prompt_tokens * self._traffic.prompt_token_s
        fails = self._draw.random() < self._traffic.faults / 2
        try:
            self._check(batch)
            sampled = [self._compute(item) for item in batch.items]
        except (AssertionError, LookupError) as error:  # the core takes it for a failed step
            self.problem = error
            raise
        keys = [(item.sequence.id, item.sequence.choice) for item in batch.items]
        if fails:
            self.failed |= set(keys)
            raise RuntimeError("a step that fails")
        if self._draw.random() < self._traffic.faults / 2:
            broken = self._draw.randrange(len(keys))
            if batch.items[broken].samples:
                self.failed.add(keys[broken])
                at = self._draw.randrange(len(sampled[broken]))
                sampled[broken][at] = -1
                # Behind a draft that was wrong nobody looks at the logits.
                drafts = batch.items[broken].drafts
                if any(drafts[i] != sampled[broken][i] for i in range(at)):
                    self.failed.remove(keys[broken])
        after = {i: tokens[1:] for i, tokens in enumerate(sampled)}
        return StepResult([tokens[0] for tokens in sampled], after_drafts=after)

    def _compute(self, item: ScheduledSequence) -> list[int]:
        """Fills the slots of the item's tokens; what follows all tokens, and each draft."""
        sequence, salt = item.sequence, item.sequence.request.cache_salt
        tokens = [*sequence.tokens[: sequence.computed + item.length], *item.drafts]
        before, seen, sampled = 0, list[int](), list[int]()
        for position, token in enumerate(tokens):
            slot = self._slot(sequence.block_table, position)
            wanted = Paper(token, before, salt)
            if position >= sequence.computed:
                self._cache[slot] = wanted
            assert self._cache[slot] == wanted, f"position {position} of {sequence.id}"
            before = hash(wanted)
            seen.append(self._cache[slot].token)
            if position + 1 >= len(sequence.tokens):
                sampled.append(self.next_token(seen))
        self.seen["drafts"] += len(item.drafts)
        return sampled or [0]

    def _slot(self, table: list[int], position: int) -> int:
        return table[position // self.block_size] * self.block_size + position % self.block_size

    def _check(self, batch: ScheduledBatch) -> None:
        keys = [(item.sequence.id, item.sequence.choice) for item in batch.items]
        assert len(set(keys)) == len(keys) <= self._traffic.max_sequences
        assert sum(item.rows for item in batch.items) <= self._traffic.token_budget
        assert all(item.length >= 1 for item in batch.items)
        tables = [item.sequence.block_table for item in batch.items]
        assert all(0 <= block < self.num_blocks for table in tables for block in table)
        for index, item in enumerate(batch.items):
            first = item.sequence.computed // self.block_size
            own = set(tables[index][first:])
            others = {b for other, table in enumerate(tables) if other != index for b in table}
            assert not own & others, "a block is written that others read"
            self.seen["shared"] += bool(set(tables[index]) & others)
            self.seen["chunks"] += not item.samples
        # Those that go on decoding come first; what is admitted again may have one token too.
        sequences = [item.sequence for item in batch.items]
        decoding = [s.uncomputed == 1 and self._last.get(s) == s.preemptions for s in sequences]
        assert decoding == sorted(decoding, reverse=True)
        for sequence in sequences:
            back = sequence.preemptions > self._last.get(sequence, 0) and sequence.computed > 0
            self.seen["found again"] += back
        self._last = {sequence: sequence.preemptions for sequence in sequences}


@dataclass(slots=True)
class Oracle:
    """What was asked for and what came."""

    runner: PaperRunner
    requests: dict[str, Request] = field(default_factory=dict)
    tokens: dict[Key, list[int]] = field(default_factory=dict)
    cached: dict[Key, int] = field(default_factory=dict)
    ends: dict[Key, Finished] = field(default_factory=dict)
    cancelled: set[Key] = field(default_factory=set)

    def add(self, request: Request) -> None:
        self.requests[request.id] = request
        for choice in range(request.choices):
            self.tokens[request.id, choice] = []

    def open(self) -> list[Key]:
        return [key for key in self.tokens if key not in self.ends]

    def take(self, output: StepOutput, now: float) -> None:
        for event in output.tokens:
            key = (event.id, event.choice)
            assert key not in self.ends, "a token after the end"
            if self.tokens[key]:
                assert event.cached == 0, "told once, with the first token"
            else:
                self.cached[key] = event.cached
            self.tokens[key].append(event.token)
        for finished in output.finished:
            key = (finished.id, finished.choice)
            assert key in self.tokens
            assert key not in self.ends, "two ends"
            self.ends[key] = finished
            self._check_tokens(key)
            self._check_reason(key, now)
            self._check_counts(key)

    def _check_tokens(self, key: Key) -> None:
        request, found, reason = self.requests[key[0]], self.tokens[key], self.ends[key].reason
        stopping = request.stopping
        whole = self.runner.expected(request.prompt, stopping.max_tokens)
        ends = {*stopping.stop_token_ids, *stopping.eos_token_ids}
        natural = next((n for n, token in enumerate(whole, 1) if token in ends), len(whole))
        assert found == whole[: len(found)]
        assert len(found) <= natural
        if reason is FinishReason.LENGTH:
            assert (found, natural) == (whole, stopping.max_tokens)
        elif reason in (FinishReason.EOS, FinishReason.STOP):
            assert len(found) == natural
            eos = found[-1] in stopping.eos_token_ids
            assert eos == (reason is FinishReason.EOS)
            assert self.ends[key].stop_token_id == found[-1]

    def _check_reason(self, key: Key, now: float) -> None:
        request, finished = self.requests[key[0]], self.ends[key]
        stopping, queue = request.stopping, request.queue_deadline
        match finished.reason:
            case FinishReason.CANCELLED:
                assert key in self.cancelled
            case FinishReason.DEADLINE:
                assert stopping.deadline is not None
                assert now >= stopping.deadline
            case FinishReason.TIME_LIMIT:
                assert stopping.time_limit is not None
                assert now >= stopping.time_limit
            case FinishReason.ERROR:
                assert key in self.runner.failed
            case FinishReason.REFUSED:
                hopeless = "speed" in finished.message
                assert stopping.deadline is not None if hopeless else queue is not None
                assert hopeless or (queue is not None and now >= queue)
                assert finished.scheduled_at is None
                assert not self.tokens[key]
            case reason:
                assert reason in (FinishReason.LENGTH, FinishReason.EOS, FinishReason.STOP)

    def _check_counts(self, key: Key) -> None:
        request, finished = self.requests[key[0]], self.ends[key]
        assert finished.cached == self.cached.get(key, finished.cached)
        assert finished.cached % self.runner.block_size == 0
        assert finished.cached < len(request.prompt), "one token at least is computed"
        if request.sampling.prompt_logprobs is not None:
            assert finished.cached == 0
        assert bool(finished.recomputed) <= bool(finished.preemptions)


class Source:
    """Requests: mostly short, sometimes as long as the pool allows; many begin alike."""

    def __init__(self, traffic: Traffic, most: int, draw: random.Random) -> None:
        self._traffic, self._most, self._draw = traffic, most, draw
        self._families = [self._tokens(most) for _ in range(traffic.families)]
        self._count = 0

    def make(self, now: float) -> Request:
        draw = self._draw
        room = self._most if draw.random() < 0.2 else min(self._most, 16)
        length = draw.randint(1, max(1, room - 1))
        shared = draw.choice([0, length, draw.randint(0, length)]) if self._families else 0
        family = draw.choice(self._families) if self._families else []
        self._count += 1
        return Request(
            id=str(self._count),
            prompt=family[:shared] + self._tokens(length - shared),
            sampling=SamplingParams(prompt_logprobs=0 if draw.random() < 0.1 else None),
            stopping=StoppingParams(
                max_tokens=draw.randint(1, room - length) if room > length else 1,
                stop_token_ids=self._ends(),
                eos_token_ids=self._ends(),
                deadline=self._limit(now),
                time_limit=self._limit(now),
            ),
            arrival=now + draw.random() / 2,
            choices=draw.randint(2, 4) if draw.random() < self._traffic.several else 1,
            priority=draw.randrange(self._traffic.priorities),
            queue_deadline=self._limit(now),
            cache_salt=draw.choice(["", "", "mine"]),
        )

    def _tokens(self, count: int) -> list[int]:
        return [self._draw.randint(1, 96) for _ in range(count)]

    def _ends(self) -> tuple[int, ...]:
        return tuple(self._draw.sample(range(1, 97), self._draw.choice([0, 0, 9])))

    def _limit(self, now: float) -> float | None:
        if self._draw.random() >= self._traffic.limits / 3:
            return None
        return now + self._draw.choice([0, 5, 20, 1000])


class Simulation:
    """A core under traffic; each step is checked against the oracle."""

    def __init__(self, traffic: Traffic, seed: str) -> None:
        self.traffic, self.draw, self.clock = traffic, random.Random(seed), Clock()
        self.runner = PaperRunner(traffic, self.draw, self.clock)
        self.oracle = Oracle(self.runner)
        config = SchedulerConfig(
            max_sequences=traffic.max_sequences,
            token_budget=traffic.token_budget,
            max_gap_s=traffic.max_gap_s,
            speculative_tokens=traffic.drafts,
        )
        self.core = EngineCore(self.runner, config, self.clock)
        self.source = Source(traffic, self.core.report().max_sequence_tokens, self.draw)
        self.steps = 0

    def come_and_go(self) -> None:
        """New requests; some leave, whole or with one of their choices."""
        traffic, draw, oracle = self.traffic, self.draw, self.oracle
        while draw.random() < traffic.load / (1 + traffic.load) and len(oracle.open()) < MOST_OPEN:
            request = self.source.make(self.clock.now)
            oracle.add(request)
            self.core.submit(request)
        if oracle.open() and draw.random() < traffic.cancels:
            name, choice = draw.choice(oracle.open())
            if draw.random() < 0.5:
                oracle.cancelled |= {key for key in oracle.open() if key[0] == name}
                self.core.cancel(name)
            else:
                oracle.cancelled.add((name, choice))
                self.core.cancel(name, choice)

    def step(self) -> None:
        self.clock.now += 1.0
        self.steps += 1
        ran, busy = self.runner.ran, self.core.has_work
        output = self.core.step()
        if self.runner.problem is not None:
            raise self.runner.problem
        assert bool(output.finished) or self.runner.ran > ran or not busy, "a step for nothing"
        self.oracle.take(output, self.clock.now)
        self.core._scheduler.check_invariants()
        stats = self.core.stats()
        assert stats.queued + stats.running == len(self.oracle.open())
        assert stats.blocks_used + stats.blocks_free + stats.blocks_cached == self.traffic.blocks

    def drain(self) -> None:
        """Nobody starves: what is left takes no more steps than if it ran one after the other,
        each token in a step of its own, and each preempted sequence once again."""
        requests = self.oracle.requests
        patience = 2 * sum(
            len(requests[name].prompt) + requests[name].stopping.max_tokens
            for name, _ in self.oracle.open()
        )
        for _ in range(patience):
            if not self.core.has_work:
                break
            self.step()
        assert not self.oracle.open()


TRAFFIC = {
    "small": Traffic(),
    "crowded": Traffic(max_sequences=8, load=2.0),
    "one at a time": Traffic(max_sequences=1, token_budget=1, load=0.1),
    "tokens as blocks": Traffic(blocks=32, block_size=1, max_sequences=6, token_budget=7, load=0.8),
    "roomy": Traffic(blocks=64, max_sequences=16, token_budget=64, load=2.0),
    "uneven": Traffic(blocks=11, block_size=3, max_sequences=5, token_budget=32, load=0.8),
    "faulty": Traffic(token_budget=16, load=0.8, faults=0.2),
    "nobody gives up": Traffic(max_sequences=8, token_budget=32, load=0.6, cancels=0, limits=0),
    "all alike": Traffic(max_sequences=8, token_budget=16, families=1, several=0.6),
    "all different": Traffic(max_sequences=6, token_budget=16, families=0, several=0, load=0.8),
    "repetitive": Traffic(
        blocks=16, max_sequences=6, token_budget=24, load=0.6, drafts=4, vocabulary=3
    ),
    "drafts in vain": Traffic(token_budget=16, load=0.8, faults=0.2, drafts=9, vocabulary=6),
    "in a hurry": Traffic(
        blocks=32,
        max_sequences=8,
        token_budget=64,
        max_gap_s=1.0,
        decode_s=0.5,
        prompt_token_s=0.05,
        load=0.8,
        limits=0.9,
    ),
}


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("name", TRAFFIC)
def test_every_choice_gets_its_own_tokens_and_one_end(name: str, seed: int) -> None:
    simulation = Simulation(TRAFFIC[name], f"{name} {seed}")
    for _ in range(STEPS):
        simulation.come_and_go()
        simulation.step()
    simulation.drain()
    stats = simulation.core.stats()
    assert stats.blocks_used == 0
    assert stats.blocks_free + stats.blocks_cached == TRAFFIC[name].blocks
    assert len(simulation.oracle.requests) > 10


def test_the_traffic_is_worth_the_name() -> None:
    """The simulation reaches everything that it is meant to prove; else it would prove little."""
    ends: set[tuple[FinishReason, bool]] = set()
    counts: Counter[str] = Counter()
    for name in ("small", "faulty", "in a hurry", "repetitive", "drafts in vain"):
        simulation = Simulation(TRAFFIC[name], f"{name} worth")
        for _ in range(STEPS):
            simulation.come_and_go()
            simulation.step()
        ends |= {(end.reason, "speed" in end.message) for end in simulation.oracle.ends.values()}
        counts += simulation.runner.seen
        stats = simulation.core.stats()
        counts += Counter(
            preempted=stats.preemptions,
            cached=stats.cached_tokens,
            recomputed=stats.recomputed_tokens,
            accepted=stats.accepted_tokens,
            rejected=stats.drafted_tokens - stats.accepted_tokens,
            several=sum(request.choices > 1 for request in simulation.oracle.requests.values()),
        )
    assert {reason for reason, _ in ends} >= {
        *(FinishReason.STOP, FinishReason.LENGTH, FinishReason.EOS, FinishReason.TIME_LIMIT),
        *(FinishReason.CANCELLED, FinishReason.DEADLINE, FinishReason.REFUSED, FinishReason.ERROR),
    }
    assert ends >= {(FinishReason.REFUSED, True), (FinishReason.REFUSED, False)}
    assert min(counts.values()) > 20
    assert set(counts) == {
        *("shared", "chunks", "found again"),
        *("preempted", "cached", "recomputed", "several", "drafts", "accepted", "rejected"),
    }
