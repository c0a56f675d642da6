"""Runs an engine in a process of its own and talks to it over a pair of sockets."""

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable

from engine.config import EngineConfig
from engine.frames import Frames, frame
from engine.messages import (
    FromEngine,
    Shutdown,
    ToEngine,
    decode_from_engine,
    encode,
    encode_config,
)

logger = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 5.0
# For what a process said before it ended.
_LAST_WORDS_S = 1.0
# Turns for which an OpenMP thread that has nothing to do spins before it sleeps: some
# microseconds, not milliseconds, since this process needs the core.
_SPINS = ("GOMP_SPINCOUNT", "1000")


class ProcessTransport:
    """One incarnation of an engine process; a restarted engine gets a new transport."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._connection: asyncio.WriteTransport | None = None
        self._closed: asyncio.Future[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._watching: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The engine process's id, while there is one."""
        return None if self._process is None else self._process.pid

    async def start(
        self, on_message: Callable[[FromEngine], None], on_exit: Callable[[str], None]
    ) -> None:
        """Starts the process. Both callbacks are called in the event loop. Raises ``OSError``."""
        # Nobody but the two processes can reach a pair, and nothing of it lies in a folder.
        ours, theirs = socket.socketpair()
        with theirs:
            self._connection, incoming = await asyncio.get_running_loop().create_unix_connection(
                lambda: _Incoming(on_message, self._give_up), sock=ours
            )
            self._closed = incoming.closed
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "engine.host"),
                *(str(theirs.fileno()), encode_config(self._config)),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env=environment(),
            )
        self._watching = asyncio.create_task(self._watch(self._process, incoming.closed, on_exit))

    def send(self, message: ToEngine) -> None:
        """Queues a message; after the process's end it goes nowhere."""
        if self._connection is not None and not self._connection.is_closing():
            self._connection.write(frame(encode(message)))

    async def stop(self) -> None:
        """Ends the engine, by force if it does not end by itself, and frees the socket."""
        self.send(Shutdown())
        if self._process is not None and self._process.returncode is None:
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._connection is not None and self._closed is not None:
            self._connection.close()
            # Awaited by itself, it would be cancelled with who waits, and others wait for it too.
            await asyncio.wait([self._closed])

    def _give_up(self) -> None:
        """Nobody would hear this engine any more: its end is seen, and it is restarted."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def _watch(
        self,
        process: asyncio.subprocess.Process,
        closed: asyncio.Future[None],
        on_exit: Callable[[str], None],
    ) -> None:
        code = await process.wait()
        await asyncio.wait([closed], timeout=_LAST_WORDS_S)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        on_exit(f"the engine process {how}")


class _Incoming(asyncio.Protocol):
    """What the engine says. ``closed`` is done when the connection is."""

    def __init__(
        self, on_message: Callable[[FromEngine], None], on_failure: Callable[[], None]
    ) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_message = on_message
        self._on_failure = on_failure
        self._frames = Frames()

    def data_received(self, data: bytes) -> None:
        messages: list[FromEngine] = []
        try:
            messages.extend(map(decode_from_engine, self._frames.feed(data)))
        except Exception:
            logger.exception("the engine's messages cannot be read")
            self._on_failure()
        for message in messages:
            self._on_message(message)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


def environment() -> dict[str, str]:
    """An engine's: ours, with fewer spins unless it says how OpenMP waits."""
    name, spins = _SPINS
    if {name, "OMP_WAIT_POLICY"} & os.environ.keys():
        return dict(os.environ)
    return {**os.environ, name: spins}
