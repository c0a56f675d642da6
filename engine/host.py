"""An engine process: `python -m engine.host DESCRIPTOR CONFIG`, started by the front end.

Speaks MessagePack over the socket that it inherits as DESCRIPTOR, and ends when the other end is
closed, if only because the front end was killed.
"""

import logging
import os
import select
import signal
import socket
import sys

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import ModelLoadError
from engine.frames import Frames, frame
from engine.loop import run_loop
from engine.messages import (
    FromEngine,
    LoadFailed,
    Loading,
    Ready,
    Shutdown,
    ToEngine,
    decode_config,
    decode_to_engine,
    encode,
)

_READ_BYTES = 1 << 16


class FrontEnd:
    """The engine's side of the connection. Owns the socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._frames = Frames()
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def send(self, message: FromEngine) -> None:
        """Ends the process where nobody is there any more."""
        try:
            self._connection.sendall(frame(encode(message)))
        except (BrokenPipeError, ConnectionResetError):
            sys.exit(0)

    def receive(self, wait: bool) -> list[ToEngine]:
        """What has arrived; with ``wait`` at least one message. ``Shutdown`` at the other's end."""
        messages: list[ToEngine] = []
        while self._poll.poll(None if wait and not messages else 0):
            try:
                data = self._connection.recv(_READ_BYTES)
            except ConnectionResetError:
                data = b""
            if not data:
                return [Shutdown()]
            messages += map(decode_to_engine, self._frames.feed(data))
        return messages


def main(descriptor: int, config: EngineConfig) -> int:
    """Loads, serves, and returns the process's exit code."""
    # The terminal's Ctrl-C goes to the front end, which drains and then says Shutdown.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.set_inheritable(descriptor, False)
    with socket.socket(fileno=descriptor) as connection:
        front_end = FrontEnd(connection)
        name = config.model_dir.name
        try:
            core = EngineCore.from_config(
                config, lambda item, items: front_end.send(Loading(item, items, name))
            )
            front_end.send(Ready(core.report()))
            run_loop(core, front_end.receive, front_end.send)
        except ModelLoadError as error:
            front_end.send(LoadFailed(str(error)))
            return 2
    return 0


if __name__ == "__main__":
    wanted = decode_config(sys.argv[2])
    logging.basicConfig(
        format="venturi: %(levelname)s %(name)s: %(message)s", level=wanted.log_level.upper()
    )
    sys.exit(main(int(sys.argv[1]), wanted))
