"""The command ``chat``: a conversation in the terminal."""

import sys
from contextlib import suppress
from typing import Unpack

import click

from venturi._client import Client
from venturi._commands import generate_options, server_options
from venturi._errors import BadRequestError, VenturiError
from venturi._explain import connect, explain, one_line
from venturi._options import ChatMessage, GenerateOptions

_HELP = "/reset starts anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


@click.command()
@click.option("--system", metavar="TEXT", help="First message, of the role system.")
@generate_options
@server_options()
def chat(
    system: str | None,
    target: str | None,
    **options: Unpack[GenerateOptions],
) -> None:
    """Talk to the model. Ctrl-C stops an answer; /reset, /exit or Ctrl-D."""
    start: list[ChatMessage] = [{"role": "system", "content": system}] if system else []
    history = start.copy()
    with connect(target) as client:
        served = client.model(options.get("model") or "")
        if not served.has_chat_template:
            raise click.ClickException(f"{served.name} has no chat template; use: venturi generate")
        click.echo(f"{served.name}@{served.variant} (/reset, /exit)", err=True)
        with suppress(ImportError):  # makes input() edit lines and remember them
            import readline  # noqa: F401
        while (line := _read()) is not None:
            if line == "/reset":
                history = start.copy()
            elif line.startswith("/"):
                click.echo(_HELP, err=True)
            elif line:
                history += _turn(client, [*history, {"role": "user", "content": line}], options)


def _read() -> str | None:
    """The next line; None to leave. Ctrl-C at the prompt discards the line."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            click.echo(nl=bool(prompt))
            return None
        except KeyboardInterrupt:
            click.echo()
            continue
        return None if line == "/exit" else line


def _turn(
    client: Client, messages: list[ChatMessage], options: GenerateOptions
) -> list[ChatMessage]:
    """Prints an answer. Returns the turn's two messages, or none where there is no answer."""
    pieces: list[str] = []
    try:
        with client.stream(messages, **options) as stream:
            for piece in stream.text_stream:
                # The template puts its own space before an answer.
                text = piece if pieces else piece.lstrip()
                if text:
                    pieces.append(text)
                    click.echo(text, nl=False)
    except KeyboardInterrupt:
        click.echo(" [stopped]", nl=False)
    except VenturiError as error:
        click.echo(f"\nventuri: {one_line(explain(error, client.target))}", err=True)
        if isinstance(error, BadRequestError) and len(messages) > 1:
            click.echo("venturi: /reset starts a conversation anew", err=True)
        return []
    click.echo()
    if not pieces:
        return []
    return [messages[-1], {"role": "assistant", "content": "".join(pieces)}]
