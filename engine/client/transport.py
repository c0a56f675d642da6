"""How the front end reaches an engine: a process of its own, or a thread."""

from collections.abc import Callable
from typing import Protocol

from engine.messages import FromEngine, ToEngine


class Transport(Protocol):
    """One incarnation of an engine."""

    async def start(
        self, on_message: Callable[[FromEngine], None], on_exit: Callable[[str], None]
    ) -> None:
        """Starts it. Both callbacks run in the event loop; ``on_exit`` says how it ended."""
        ...

    def send(self, message: ToEngine) -> None:
        """Never blocks, never raises for an engine that has ended."""
        ...

    async def stop(self) -> None:
        """Ends the engine if it still runs and frees what it used. Idempotent."""
        ...
