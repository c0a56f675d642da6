"""``python -m compress``: the server's child process, and the command without the SDK."""

import signal
import sys

from compress.cli import compress_command


def _terminate(*_: object) -> None:
    # As an exception it unwinds, so that the temporary folder goes.
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    compress_command(prog_name="python -m compress")
