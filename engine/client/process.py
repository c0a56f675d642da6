"""Runs an engine in a process of its own and talks to it over a Unix socket."""

import asyncio
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable

import zmq
import zmq.asyncio

from engine.config import EngineConfig
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


class ProcessTransport:
    """One incarnation of an engine process; a restarted engine gets a new transport."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._folder = ""
        self._socket: zmq.asyncio.Socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def pid(self) -> int | None:
        """The engine process's id, while there is one."""
        return None if self._process is None else self._process.pid

    async def start(
        self, on_message: Callable[[FromEngine], None], on_exit: Callable[[str], None]
    ) -> None:
        """Starts the process. Both callbacks are called in the event loop. Raises ``OSError``."""
        # mkdtemp's folder is open to this user only, and so is the socket in it.
        self._folder = tempfile.mkdtemp(prefix="venturi-")
        address = f"ipc://{self._folder}/engine.sock"
        self._socket = _bind(address)
        arguments = (address, str(os.getpid()), encode_config(self._config))
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "engine.host", *arguments, start_new_session=True
        )
        self._tasks = [
            asyncio.create_task(self._read(self._socket, self._process, on_message)),
            asyncio.create_task(self._watch(self._process, on_exit)),
        ]

    def send(self, message: ToEngine) -> None:
        """Queues a message; after the process's end it goes nowhere."""
        if self._socket is not None and not self._socket.closed:
            # A PAIR socket without a high-water mark takes it at once: nothing to await.
            self._socket.send(encode(message))

    async def stop(self) -> None:
        """Ends the process, by force if it does not end by itself, and frees the socket."""
        self.send(Shutdown())
        if self._process is not None and self._process.returncode is None:
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _read(
        self,
        socket: zmq.asyncio.Socket,
        process: asyncio.subprocess.Process,
        on_message: Callable[[FromEngine], None],
    ) -> None:
        try:
            while True:
                on_message(decode_from_engine(await socket.recv()))
        except Exception:
            # Nobody would hear this engine any more: its end is seen, and it is restarted.
            logger.exception("the engine's messages cannot be read")
            process.kill()

    async def _watch(
        self, process: asyncio.subprocess.Process, on_exit: Callable[[str], None]
    ) -> None:
        code = await process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        on_exit(f"the engine process {how}")


def _bind(address: str) -> zmq.asyncio.Socket:
    try:
        socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        try:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.bind(address)
        except zmq.ZMQError:
            socket.close()
            raise
    except zmq.ZMQError as error:  # not an OSError, though it has an errno
        raise OSError(error.errno, f"cannot open {address}: {error}") from error
    return socket
