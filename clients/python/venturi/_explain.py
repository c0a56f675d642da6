"""A client error as one line for a terminal, with what to do about it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import click

from venturi._client import Client
from venturi._errors import (
    APIConnectionError,
    APITimeoutError,
    BadRequestError,
    RateLimitError,
    UnavailableError,
    VenturiError,
)


class Unreachable(click.ClickException):
    """There is no server to talk to."""

    exit_code = 2


@contextmanager
def connect(target: str | None, timeout: float = 600.0) -> Iterator[Client]:
    """A client whose errors end the command with one line."""
    try:
        with Client(target, timeout=timeout) as client:
            try:
                yield client
            except APIConnectionError as error:
                raise Unreachable(explain(error, client.target)) from error
            except VenturiError as error:
                raise click.ClickException(explain(error, client.target)) from error
    except ValueError as error:  # an option's value that no request can hold
        raise click.UsageError(str(error), click.get_current_context()) from error


def explain(error: VenturiError, target: str) -> str:
    """What went wrong, and the remedy where one is known."""
    text = error.message
    if isinstance(error, APIConnectionError):
        if error.partial:
            return f"lost the connection to {target}: {text}"
        return f"cannot reach {target}: is the server running? start it with: venturi serve"
    if isinstance(error, BadRequestError) and error.violations:
        text = "; ".join(f"{field}: {description}" for field, description in error.violations)
    if isinstance(error, RateLimitError | UnavailableError):
        wait = error.retry_after
        text += ": try again" + (f" in {wait:.1f} s" if wait else " later")
    if isinstance(error, APITimeoutError):
        text += ": allow more time with --timeout"
    return f"{text} (request {error.request_id})" if error.request_id else text


def one_line(text: str) -> str:
    """Text without line breaks and other control characters."""
    return re.sub(r"[\x00-\x20\x7f-\x9f]+", " ", text).strip()
