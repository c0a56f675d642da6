"""Files that several processes share: replaced whole, and locked by name. Imports no torch."""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from compress.errors import writing
from compress.progress import Progress


def write_whole(file: Path, content: str) -> None:
    """Replaces ``file`` in one step, after its new content is on the disk. Raises ``OSError``."""
    fresh = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        with fresh.open("w", encoding="utf-8") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(file)
    finally:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, progress: Progress, busy: str, remedy: str) -> Iterator[None]:
    """Holds the lock of ``path``, whose folder must exist.

    ``busy`` tells what another process does that holds it. Raises ``CompressError`` that ends in
    ``remedy`` where the file cannot be made.
    """
    with writing(path.parent, remedy):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.phase("waiting", busy)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
