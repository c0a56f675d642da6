"""The events of one request, gathered until somebody asks for them."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.types import Finished, TokenEvent, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Coalescing:
    """How many tokens may go out together, and how long the first of them may wait (s)."""

    max_tokens: int = 16
    max_delay: float = 0.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")


@dataclass(frozen=True, slots=True)
class Slice:
    """The next tokens of a choice, and its terminal event once all tokens before are out."""

    tokens: list[TokenEvent]
    finished: Finished | None
    choice: int = 0


@dataclass(slots=True)
class _Choice:
    tokens: list[TokenEvent] = field(default_factory=list)
    since: float = 0.0  # when the first of ``tokens`` came, or before
    finished: Finished | None = None
    started: bool = False
    delivered: bool = False  # the terminal event is out

    def ready(self, coalescing: Coalescing, now: float) -> bool:
        """Whether something is there that need not wait for more."""
        if self.finished is not None:
            return not self.delivered
        enough = not self.started or len(self.tokens) >= coalescing.max_tokens
        return bool(self.tokens) and (enough or now >= self.since + coalescing.max_delay)


class TokenStream:
    """Bounded by the request's own max_tokens: a slow reader finds more at once.

    ``on_start`` is called once: when the first token or terminal event is there, read or not.
    """

    def __init__(self, choices: int = 1) -> None:
        self.choices = choices
        self.prompt: list[TokenLogprobs] = []
        self.on_start: Callable[[], None] = lambda: None
        self._choices = [_Choice() for _ in range(choices)]
        self._started = False
        self._arrived = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether every choice has had its terminal event."""
        return all(choice.finished is not None for choice in self._choices)

    def put_prompt(self, tokens: list[TokenLogprobs]) -> None:
        """Adds log-probabilities of the prompt; they come before its first token."""
        self.prompt += tokens

    def put_token(self, event: TokenEvent) -> None:
        """Adds a token."""
        choice = self._choices[event.choice]
        if not choice.tokens:
            choice.since = time.monotonic()
        choice.tokens.append(event)
        self._arrive()

    def put_finished(self, finished: Finished) -> None:
        """Adds a choice's terminal event. The first one counts."""
        choice = self._choices[finished.choice]
        choice.finished = choice.finished or finished
        self._arrive()

    async def next(self, coalescing: Coalescing) -> Slice:
        """Waits for at least one event. A choice's first token never waits for others."""
        while (index := self._ready(coalescing)) is None:
            await self._more(coalescing)
        choice = self._choices[index]
        choice.started = True
        tokens = choice.tokens[: coalescing.max_tokens]
        choice.tokens = choice.tokens[coalescing.max_tokens :]
        if choice.tokens or choice.finished is None:
            return Slice(tokens, None, index)
        choice.delivered = True
        return Slice(tokens, choice.finished, index)

    def _arrive(self) -> None:
        if not self._started:
            self._started = True
            self.on_start()
        self._arrived.set()

    def _ready(self, coalescing: Coalescing) -> int | None:
        now = time.monotonic()
        ready = [i for i, choice in enumerate(self._choices) if choice.ready(coalescing, now)]
        # The one with most waits longest; of equals the first.
        return max(ready, key=lambda i: len(self._choices[i].tokens), default=None)

    async def _more(self, coalescing: Coalescing) -> None:
        """Waits for another event, or until a choice's tokens have waited long enough."""
        first = min((choice.since for choice in self._choices if choice.tokens), default=None)
        left = None if first is None else first + coalescing.max_delay - time.monotonic()
        self._arrived.clear()
        try:
            async with asyncio.timeout(left):
                await self._arrived.wait()
        except TimeoutError:
            pass
