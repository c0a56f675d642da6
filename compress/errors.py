"""What compression raises for its caller, and how the operating system's errors become it."""

import errno
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
