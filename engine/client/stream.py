"""The events of one request, gathered until somebody asks for them."""

import asyncio
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
    finished: Finished | None = None
    started: bool = False
    delivered: bool = False  # the terminal event is out

    @property
    def pending(self) -> bool:
        return bool(self.tokens) or (self.finished is not None and not self.delivered)


class TokenStream:
    """Bounded by the request's own max_tokens: a slow reader finds more at once."""

    def __init__(self, choices: int = 1) -> None:
        self.choices = choices
        self.prompt: list[TokenLogprobs] = []
        self._choices = [_Choice() for _ in range(choices)]
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
        self._choices[event.choice].tokens.append(event)
        self._arrived.set()

    def put_finished(self, finished: Finished) -> None:
        """Adds a choice's terminal event. The first one counts."""
        choice = self._choices[finished.choice]
        choice.finished = choice.finished or finished
        self._arrived.set()

    async def next(self, coalescing: Coalescing) -> Slice:
        """Waits for at least one event. A choice's first token never waits for others."""
        while (index := self._pending()) is None:
            self._arrived.clear()
            await self._arrived.wait()
        choice = self._choices[index]
        if choice.started and coalescing.max_delay > 0:
            await self._gather(choice, coalescing)
        choice.started = True
        tokens = choice.tokens[: coalescing.max_tokens]
        choice.tokens = choice.tokens[coalescing.max_tokens :]
        if choice.tokens or choice.finished is None:
            return Slice(tokens, None, index)
        choice.delivered = True
        return Slice(tokens, choice.finished, index)

    def _pending(self) -> int | None:
        pending = [i for i, choice in enumerate(self._choices) if choice.pending]
        # The one with most waits longest; of equals the first.
        return max(pending, key=lambda i: len(self._choices[i].tokens), default=None)

    async def _gather(self, choice: _Choice, coalescing: Coalescing) -> None:
        try:
            async with asyncio.timeout(coalescing.max_delay):
                while len(choice.tokens) < coalescing.max_tokens and choice.finished is None:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            pass
