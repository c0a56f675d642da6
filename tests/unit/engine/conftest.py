"""Shared by the engine's unit tests: requests by the dozen, a clock that tests turn."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.types import Request, SamplingParams, StoppingParams

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tests share the machine; torch's threads would wait for each other."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The model that ships with the server."""
    return ROOT / "server" / "assets" / "venturi-mini"


@pytest.fixture
def make_request() -> Callable[..., Request]:
    """Requests in order of arrival: ``make(id, prompt or its length, max_tokens, **stopping)``."""
    arrivals = itertools.count()

    def make(
        request_id: str = "a",
        prompt: int | list[int] = 3,
        max_tokens: int = 4,
        *,
        sampling: SamplingParams | None = None,
        **stopping: object,
    ) -> Request:
        return Request(
            id=request_id,
            prompt=list(range(1, prompt + 1)) if isinstance(prompt, int) else prompt,
            sampling=sampling or SamplingParams(),
            stopping=StoppingParams(max_tokens=max_tokens, **stopping),  # type: ignore[arg-type]
            arrival=float(next(arrivals)),
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
