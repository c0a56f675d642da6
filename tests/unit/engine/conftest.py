"""Shared by the engine's unit tests: requests by the dozen, a clock that tests turn."""

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.block_manager import BlockManager
from engine.config import SchedulerConfig
from engine.scheduler import Scheduler
from engine.types import (
    Finished,
    FinishReason,
    Request,
    SamplingParams,
    ScheduledBatch,
    StepResult,
    StoppingParams,
    TokenEvent,
)

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tests share the machine; torch's threads would wait for each other."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


@pytest.fixture
def use_set(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Chooses the instruction set that native kernels run on for the rest of the test."""
    from engine.kernels.cpu.library import kernels  # brings torch, which few of these tests need

    def use(name: str) -> None:
        monkeypatch.setenv("VENTURI_CPU_ISA", name)
        kernels.cache_clear()

    yield use
    monkeypatch.undo()
    kernels.cache_clear()


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The model that ships with the server."""
    return ROOT / "server" / "assets" / "venturi-mini"


@pytest.fixture
def make_request() -> Callable[..., Request]:
    """Requests in order of arrival: ``make(id, prompt or its length, max_tokens, **stopping)``.

    They share no cached prefix unless they are given the same ``cache_salt``.
    """
    arrivals = itertools.count()

    def make(
        request_id: str = "a",
        prompt: int | list[int] = 3,
        max_tokens: int = 4,
        *,
        sampling: SamplingParams | None = None,
        choices: int = 1,
        priority: int = 0,
        queue_deadline: float | None = None,
        cache_salt: str | None = None,
        **stopping: object,
    ) -> Request:
        return Request(
            id=request_id,
            prompt=list(range(1, prompt + 1)) if isinstance(prompt, int) else prompt,
            sampling=sampling or SamplingParams(),
            stopping=StoppingParams(max_tokens=max_tokens, **stopping),  # type: ignore[arg-type]
            arrival=float(next(arrivals)),
            choices=choices,
            priority=priority,
            queue_deadline=queue_deadline,
            cache_salt=request_id if cache_salt is None else cache_salt,
        )

    return make


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def named(request_id: str, choice: int) -> str:
    """``a`` is the first choice of request a, ``a.1`` its second."""
    return f"{request_id}.{choice}" if choice else request_id


class Rig:
    """A scheduler with its blocks; steps by hand and gathers what comes out.

    Between two steps a second passes. A step itself takes what ``cost`` says of its decodes
    and its prompt tokens, nothing at first.
    """

    def __init__(
        self,
        *,
        blocks: int = 16,
        block_size: int = 4,
        max_sequences: int = 8,
        token_budget: int = 64,
        context_length: int = 64,
        max_gap_s: float = 1e9,
        speculative_tokens: int = 0,
    ) -> None:
        self.blocks = BlockManager(blocks, block_size)
        config = SchedulerConfig(
            max_sequences=max_sequences,
            token_budget=token_budget,
            max_gap_s=max_gap_s,
            speculative_tokens=speculative_tokens,
        )
        self.scheduler = Scheduler(config, self.blocks, context_length)
        self.cost: Callable[[int, int], float] = lambda decodes, prompt_tokens: 0.0
        self.now = 0.0
        self.tokens: dict[str, list[int]] = {}
        self.events: dict[str, list[TokenEvent]] = {}
        self.finished: dict[str, Finished] = {}
        self.computed: dict[str, int] = {}
        self.batch = ScheduledBatch([])

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add(request, self.now)

    def schedule(self) -> dict[str, int]:
        """Tokens of each sequence in the next step, in the order of the batch's rows."""
        self.batch, ended = self.scheduler.schedule(self.now)
        self._end(ended)
        self.scheduler.check_invariants()
        return {named(i.sequence.id, i.sequence.choice): i.length for i in self.batch.items}

    def commit(self, token: int = 7) -> None:
        lengths = [item.length for item in self.batch.items]
        self.now += self.cost(lengths.count(1), sum(n for n in lengths if n > 1))
        for item in self.batch.items:
            name = named(item.sequence.id, item.sequence.choice)
            self.computed[name] = self.computed.get(name, 0) + item.length
        output = self.scheduler.commit(self.batch, StepResult([token] * len(lengths)), self.now)
        for event in output.tokens:
            name = named(event.id, event.choice)
            assert name not in self.finished, "a token after the end"
            self.tokens.setdefault(name, []).append(event.token)
            self.events.setdefault(name, []).append(event)
        self._end(output.finished)
        self.scheduler.check_invariants()

    def step(self, token: int = 7) -> dict[str, int]:
        lengths = self.schedule()
        self.commit(token)
        self.now += 1.0
        return lengths

    def run(self, steps: int = 500) -> None:
        for _ in range(steps):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError(f"still at work: {self.scheduler!r}")

    def reasons(self) -> dict[str, FinishReason]:
        return {name: one.reason for name, one in self.finished.items()}

    def _end(self, ended: list[Finished]) -> None:
        for one in ended:
            name = named(one.id, one.choice)
            assert name not in self.finished, f"{name} ended twice"
            self.finished[name] = one


@pytest.fixture
def make_rig() -> Callable[..., Rig]:
    return Rig


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch runs with so many."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)
