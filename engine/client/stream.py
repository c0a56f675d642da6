"""The events of one request, gathered until somebody asks for them."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.types import Finished, TokenEvent, TokenLogprobs

# A message costs a server and a client on one machine some 0.1 ms, which the model then lacks.
_CROWD_DELAY_S = 0.0013  # for each stream in the crowd but one
_MOST_CROWD_DELAY_S = 0.04


@dataclass(frozen=True, slots=True, kw_only=True)
class Coalescing:
    """How many tokens may go out together, and how long the first of them may wait (s).

    Without a ``max_delay``, nothing waits in a lone stream, and in a crowd longer the larger it
    is: what the server spends on messages is bounded.
    """

    max_tokens: int = 16
    max_delay: float | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")

    def delay(self, crowd: int) -> float:
        """How long a token may wait where tokens go out of so many streams."""
        if self.max_delay is not None:
            return self.max_delay
        return min(_CROWD_DELAY_S * max(0, crowd - 1), _MOST_CROWD_DELAY_S)


@dataclass(slots=True)
class Crowd:
    """How many streams have begun to get tokens, and have not ended."""

    size: int = 0


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

    def ready(self, most: int, due: float) -> bool:
        """Whether something is there that need not wait for more: ``most`` tokens, or some that
        came up to ``due``."""
        if self.finished is not None:
            return not self.delivered
        if not self.tokens:
            return False
        return not self.started or len(self.tokens) >= most or self.since <= due


class TokenStream:
    """Bounded by the request's own max_tokens: a slow reader finds more at once.

    ``on_start`` is called once: when the first token or terminal event is there, read or not.
    ``crowd`` is what all streams of an engine share.
    """

    def __init__(self, choices: int = 1, crowd: Crowd | None = None) -> None:
        self.choices = choices
        self.prompt: list[TokenLogprobs] = []
        self.on_start: Callable[[], None] = lambda: None
        self._choices = [_Choice() for _ in range(choices)]
        self._crowd = crowd or Crowd()
        self._in_crowd = False
        self._started = False
        self._overdue = False  # tokens have waited long enough
        self._arrived = asyncio.Event()
        # What the reader waits for: None where the next event, whatever it is, must wake it.
        self._awaited: Coalescing | None = None

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
        if not self._in_crowd and not self.ended:
            self._in_crowd = True
            self._crowd.size += 1
        if not choice.tokens:
            choice.since = time.monotonic()
        choice.tokens.append(event)
        self._arrive()

    def put_finished(self, finished: Finished) -> None:
        """Adds a choice's terminal event. The first one counts."""
        choice = self._choices[finished.choice]
        choice.finished = choice.finished or finished
        if self._in_crowd and self.ended:
            self._in_crowd = False
            self._crowd.size -= 1
        self._arrive()

    async def next(self, coalescing: Coalescing) -> Slice:
        """Waits for at least one event. A choice's first token never waits for others."""
        while (index := self._ready(coalescing)) is None:
            await self._more(coalescing)
        self._overdue = False
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
        if self._awaited is None or self._ready(self._awaited) is not None:
            self._arrived.set()

    def _time_is_over(self) -> None:
        self._overdue = True
        self._arrived.set()

    def _ready(self, coalescing: Coalescing) -> int | None:
        # A loop's timer may be early by the clock: what it says counts.
        delay = 0.0 if self._overdue else coalescing.delay(self._crowd.size)
        due, most = time.monotonic() - delay, coalescing.max_tokens
        if self.choices == 1:
            return 0 if self._choices[0].ready(most, due) else None
        ready = [i for i, choice in enumerate(self._choices) if choice.ready(most, due)]
        # The one with most waits longest; of equals the first.
        return max(ready, key=lambda i: len(self._choices[i].tokens), default=None)

    async def _more(self, coalescing: Coalescing) -> None:
        """Waits for another event, or until a choice's tokens have waited long enough."""
        first = min((choice.since for choice in self._choices if choice.tokens), default=None)
        timer = None
        if first is not None:
            self._awaited = coalescing
            left = first + coalescing.delay(self._crowd.size) - time.monotonic()
            timer = asyncio.get_running_loop().call_later(max(0.0, left), self._time_is_over)
        self._arrived.clear()
        try:
            await self._arrived.wait()
        finally:
            self._awaited = None
            if timer is not None:
                timer.cancel()
