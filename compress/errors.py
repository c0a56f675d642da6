"""What compression raises for its caller, and how the operating system's errors become it."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the limit on file sizes is reached",
    errno.EACCES: "it is not writable",
    errno.EPERM: "it is not writable",
    errno.EROFS: "the file system is read-only",
}


class CompressError(Exception):
    """``str(error)`` is one line that says what is wrong and what to do about it."""


def check_output(file: Path, option: str) -> None:
    """Whether ``file``, which ``option`` names, can be written, before the work that fills it.

    Raises ``CompressError``.
    """
    folder, remedy = file.parent, f"name another file with {option}"
    if file.is_dir():
        raise CompressError(f"{file} is a folder: {remedy}")
    if not folder.is_dir():
        raise CompressError(f"{folder} is not a folder: make it, or {remedy}")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise CompressError(f"cannot write to {file}: it is not writable: {remedy}")


@contextmanager
def writing(target: Path, remedy: str) -> Iterator[None]:
    """Turns a failed write at or below ``target`` into a ``CompressError`` that ends in ``remedy``.

    Args:
        target: what the message names.
        remedy: what the user can do, such as ``name another folder with --out``.
    """
    try:
        yield
    except OSError as error:
        number = error.errno or 0
        reason = _REASONS.get(number, error.strerror or type(error).__name__)
        raise CompressError(f"cannot write to {target}: {reason}: {remedy}") from error


def write_output(file: Path, text: str, option: str) -> None:
    """Writes what ``option`` names. Raises ``CompressError``."""
    with writing(file, f"name another file with {option}"):
        file.write_text(text, encoding="utf-8")
