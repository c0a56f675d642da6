"""``python -m compress.gate``: the server's child process for a folder that is compressed."""

from compress.exits import exit_on_sigterm
from compress.gate.cli import judge_command

if __name__ == "__main__":
    exit_on_sigterm()
    judge_command(prog_name="python -m compress.gate")
