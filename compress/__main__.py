"""``python -m compress``: the server's child process, and the command without the SDK."""

from compress.cli import compress_command
from compress.exits import exit_on_sigterm

if __name__ == "__main__":
    exit_on_sigterm()
    compress_command(prog_name="python -m compress")
