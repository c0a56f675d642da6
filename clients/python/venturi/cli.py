"""The ``venturi`` command: its group, its errors, and the commands that other packages add.

The server application adds its commands as entry points. They are listed here without being
imported, so that ``venturi --help`` needs no model library.
"""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import NoReturn

import click

from venturi._chat import chat
from venturi._commands import generate, health, lm_eval, model
from venturi._explain import one_line

_GROUP = "venturi.commands"
# Help of the server application's commands, which are not imported to be listed.
_SERVER_COMMANDS = {
    "serve": "Run the inference service.",
    "compress": "Compress a model into an artefact.",
    "evaluate": "Measure a compressed model against the original.",
    "export": "Write a sparse artefact with explicit zeros.",
    "doctor": "Check what this machine can run.",
}
_USAGE_ERROR = 2
_INTERRUPTED = 130


class VenturiGroup(click.Group):
    """Loads further commands when they are invoked, and reports each error as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands, found without importing any."""
        return [*super().list_commands(ctx), *sorted(_further_commands())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command of this package, or one that is imported now."""
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            return command
        entry = _further_commands().get(cmd_name)
        if entry is not None:
            return _load(entry)
        if cmd_name in _SERVER_COMMANDS:
            raise click.UsageError(
                f"`{cmd_name}` is a command of the server application, "
                "which is not installed in this environment"
            )
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands, in two sections."""
        own = [
            (name, command.get_short_help_str(limit=60)) for name, command in self.commands.items()
        ]
        further = [
            (name, _SERVER_COMMANDS.get(name, f"From {entry.module}."))
            for name, entry in sorted(_further_commands().items())
        ]
        for title, rows in (("Client commands", own), ("Server commands", further)):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: object,
    ) -> NoReturn:
        """Runs a command line and exits: 0, 2 for usage and connection, 1 for other errors."""
        try:
            result = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.UsageError as error:
            help_command = error.ctx.command_path if error.ctx else "venturi"
            _fail(f"{error.format_message()} (see: {help_command} --help)", _USAGE_ERROR)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except click.Abort:
            _fail("interrupted", _INTERRUPTED)
        except Exception as error:
            if os.environ.get("VENTURI_DEBUG"):
                raise
            _fail(f"{type(error).__name__}: {error} (VENTURI_DEBUG=1 shows where)", 1)
        sys.exit(result if isinstance(result, int) else 0)


def _further_commands() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=_GROUP)}


def _load(entry: EntryPoint) -> click.Command:
    try:
        command: click.Command = entry.load()
    except ImportError as error:
        raise click.ClickException(
            f"cannot load `{entry.name}`: {error}; is the server installed completely?"
        ) from error
    return command


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"venturi: {one_line(message)}", err=True)
    sys.exit(code)


@click.group(
    name="venturi",
    cls=VenturiGroup,
    commands=[generate, chat, health, model, lm_eval],
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="venturi-client", prog_name="venturi")
@click.pass_context
def group(ctx: click.Context) -> None:
    """Compress, prove and serve language models, and talk to a server.

    The server's address is --target, else the environment's VENTURI_TARGET, else
    127.0.0.1:50051.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> NoReturn:
    """Entry point of the ``venturi`` script."""
    group.main(prog_name="venturi")
