"""The events of one request, gathered until somebody asks for them."""

import asyncio
from dataclasses import dataclass

from engine.types import Finished


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
    """The next tokens, and the terminal event once all tokens before it are out."""

    tokens: list[int]
    finished: Finished | None


class TokenStream:
    """Bounded by the request's own max_tokens: a slow reader finds more at once."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._finished: Finished | None = None
        self._arrived = asyncio.Event()
        self._started = False

    def put_token(self, token: int) -> None:
        """Adds a token."""
        self._tokens.append(token)
        self._arrived.set()

    def put_finished(self, finished: Finished) -> None:
        """Adds the terminal event. The first one counts."""
        self._finished = self._finished or finished
        self._arrived.set()

    async def next(self, coalescing: Coalescing) -> Slice:
        """Waits for at least one event. The very first token never waits for others."""
        while not self._tokens and self._finished is None:
            self._arrived.clear()
            await self._arrived.wait()
        if self._started and coalescing.max_delay > 0:
            await self._gather(coalescing)
        self._started = True
        tokens = self._tokens[: coalescing.max_tokens]
        self._tokens = self._tokens[coalescing.max_tokens :]
        return Slice(tokens, None if self._tokens else self._finished)

    async def _gather(self, coalescing: Coalescing) -> None:
        try:
            async with asyncio.timeout(coalescing.max_delay):
                while len(self._tokens) < coalescing.max_tokens and self._finished is None:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            pass
