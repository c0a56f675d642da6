"""An engine in a thread of this process: for embedding and for tests."""

import asyncio
import queue
import threading
from collections.abc import Callable

from engine.core import EngineCore
from engine.errors import ModelLoadError
from engine.loop import run_loop
from engine.messages import FromEngine, LoadFailed, Ready, Shutdown, ToEngine


class LocalTransport:
    """Runs ``make_core()`` in a thread; the same interface as a process of its own."""

    def __init__(self, make_core: Callable[[], EngineCore]) -> None:
        self._make_core = make_core
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def start(
        self, on_message: Callable[[FromEngine], None], on_exit: Callable[[str], None]
    ) -> None:
        """Starts the thread. Both callbacks are called in the event loop."""
        loop = asyncio.get_running_loop()

        def send(message: FromEngine) -> None:
            loop.call_soon_threadsafe(on_message, message)

        def main() -> None:
            how = "the engine thread stopped"
            try:
                core = self._make_core()
                send(Ready(core.report()))
                run_loop(core, self._receive, send)
            except ModelLoadError as error:
                send(LoadFailed(str(error)))
            except Exception:
                how = "the engine thread failed"
                raise
            finally:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(on_exit, how)

        self._thread = threading.Thread(target=main, name="engine", daemon=True)
        self._thread.start()

    def send(self, message: ToEngine) -> None:
        """Queues a message for the engine."""
        self._inbox.put(message)

    async def stop(self) -> None:
        """Ends the thread; requests that still run get no more events."""
        self.send(Shutdown())
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _receive(self, wait: bool) -> list[ToEngine]:
        messages = [self._inbox.get()] if wait else []
        while not self._inbox.empty():
            messages.append(self._inbox.get())
        return messages
