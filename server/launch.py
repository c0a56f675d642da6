"""`venturi serve`: hands over to a process in which gRPC was not imported yet."""

import os
import sys

import click


@click.command(
    "serve",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(arguments: tuple[str, ...]) -> None:
    """Run the inference service."""
    # -P: a folder named server or compress in the working directory is not ours.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "server", *arguments])
