"""The events of one request, gathered until somebody asks for them."""

import asyncio
from dataclasses import dataclass

from engine.types import Finished


@dataclass(frozen=True, slots=True)
class Slice:
    """Tokens since the last slice, and the terminal event once it has come."""

    tokens: list[int]
    finished: Finished | None


class TokenStream:
    """Bounded by the request's own max_tokens; a slow reader gets larger slices."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._finished: Finished | None = None
        self._arrived = asyncio.Event()

    def put_token(self, token: int) -> None:
        """Adds a token."""
        self._tokens.append(token)
        self._arrived.set()

    def put_finished(self, finished: Finished) -> None:
        """Adds the terminal event. The first one counts."""
        self._finished = self._finished or finished
        self._arrived.set()

    async def next(self) -> Slice:
        """Waits for at least one event and returns all there are."""
        await self._arrived.wait()
        self._arrived.clear()
        tokens, self._tokens = self._tokens, []
        return Slice(tokens, self._finished)
