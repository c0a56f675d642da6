"""Notices an engine that stops answering, and that it answers again."""

import asyncio
import time
from collections.abc import Awaitable, Callable

# Longer than the longest step: 512 prompt tokens of a model with 8 G weights take half of it.
DEFAULT_SILENCE_S = 60.0
_ASKS = 10  # in the time that an engine has to answer


class Heartbeat:
    """Asks the engine, and waits for any word of it.

    An engine answers between steps, so that ``silence_s`` must be longer than its longest step.
    ``ask`` sends a question, or returns False where there is nobody to ask. ``on_change`` hears
    True when nothing came for ``silence_s`` seconds after a question, and False with the next
    word.
    """

    def __init__(
        self,
        silence_s: float,
        ask: Callable[[], bool],
        on_change: Callable[[bool], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.silence_s = silence_s
        self._ask = ask
        self._on_change = on_change
        self._clock = clock
        self._sleep = sleep
        self._asked: float | None = None  # when; None: no question is open
        self._silent = False

    def heard(self) -> None:
        """The engine said something."""
        self._asked = None
        if self._silent:
            self._silent = False
            self._on_change(False)

    def forget(self) -> None:
        """The engine ended: its successor owes no answer."""
        self._asked, self._silent = None, False

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self._sleep(self.silence_s / _ASKS)
            now = self._clock()
            if self._asked is None:
                self._asked = now if self._ask() else None
            elif not self._silent and now - self._asked > self.silence_s:
                self._silent = True
                self._on_change(True)
