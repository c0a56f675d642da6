"""An engine process: `python -m engine.host SOCKET PARENT CONFIG`, started by the front end.

Speaks MessagePack over a Unix socket that only this user can open. Ends with its parent.
"""

import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import zmq

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import ModelLoadError
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

_IDLE_POLL_MS = 1000


def main(address: str, parent: int, config: EngineConfig) -> int:
    """Loads, serves, and returns the process's exit code."""
    # The terminal's Ctrl-C goes to the front end, which drains and then says Shutdown.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.connect(address)

    def send(message: FromEngine) -> None:
        socket.send(encode(message))

    def receive(wait: bool) -> list[ToEngine]:
        if os.getppid() != parent:
            return [Shutdown()]
        if wait:
            socket.poll(_IDLE_POLL_MS)
        messages: list[ToEngine] = []
        while socket.poll(0):
            messages.append(decode_to_engine(socket.recv()))
        return messages

    try:
        name = config.model_dir.name
        core = EngineCore.from_config(config, lambda item, items: send(Loading(item, items, name)))
        send(Ready(core.report()))
        run_loop(core, receive, send)
    except ModelLoadError as error:
        send(LoadFailed(str(error)))
        return 2
    finally:
        if os.getppid() != parent:
            _clear_up(Path(address.removeprefix("ipc://")))
    return 0


def _clear_up(socket: Path) -> None:
    """For a parent that was killed: its socket, and the folder if nothing else is in it."""
    with suppress(OSError):
        socket.unlink(missing_ok=True)
        socket.parent.rmdir()


if __name__ == "__main__":
    wanted = decode_config(sys.argv[3])
    logging.basicConfig(
        format="venturi: %(levelname)s %(name)s: %(message)s", level=wanted.log_level.upper()
    )
    sys.exit(main(sys.argv[1], int(sys.argv[2]), wanted))
