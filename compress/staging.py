"""Publishes a folder in one step: written beside its place, fsynced, renamed.

The process that writes a temporary folder holds the lock of a file in it. One whose lock is
free was left by a dead process, and the next run beside it removes it.
"""

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.errors import CompressError
from compress.sources import MANIFEST_NAME, REPORT_NAME

_SUFFIX = ".venturi-tmp"
_LOCK_NAME = ".lock"


@contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """A locked temporary folder beside ``out``; removed at the end unless it was published."""
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out.parent)
    folder, lock = _create(out)
    try:
        yield folder
    finally:
        # Published, the name is gone already.
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def check_replaceable(out: Path) -> None:
    """Raises ``CompressError`` where ``out`` holds something that is no part of an artefact."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.is_dir() and (out / MANIFEST_NAME).is_file():
        own = {*_files(out / MANIFEST_NAME), MANIFEST_NAME, REPORT_NAME, _LOCK_NAME}
        if others := sorted({path.name for path in out.iterdir()} - own):
            raise CompressError(
                f"{out} holds {others[0]}, which is no part of its artefact and would be lost: "
                "move it, or name another folder with --out"
            )
    elif out.exists():
        raise CompressError(
            f"{out} exists and is not a Venturi artefact: name another folder with --out"
        )


def _files(manifest: Path) -> set[str]:
    """Names of the artefact's files; none where the manifest is broken."""
    try:
        return set(json.loads(manifest.read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def publish(folder: Path, out: Path) -> None:
    """Makes ``folder`` durable and puts it in the place of ``out``."""
    for path in [*folder.iterdir(), folder]:
        _fsync(path)
    if out.exists():
        # A name that the next run sweeps away, should this one die in between.
        old = _temporary_name(out)
        out.rename(old)
        folder.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        folder.rename(out)
    # Only now: without it another process might sweep the folder away before the rename.
    (out / _LOCK_NAME).unlink()
    _fsync(out.parent)


def remove_leftovers(parent: Path) -> None:
    """Removes temporary folders in ``parent`` whose process is gone."""
    for folder in parent.glob(f".*{_SUFFIX}"):
        try:
            lock = _open_lock(folder)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(lock)


def _create(out: Path) -> tuple[Path, int]:
    while True:
        folder = _temporary_name(out)
        folder.mkdir()
        try:
            lock = _open_lock(folder)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Another process may have swept the folder before it was locked.
        if os.fstat(lock).st_nlink:
            return folder, lock
        os.close(lock)


def _open_lock(folder: Path) -> int:
    return os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)


def _temporary_name(out: Path) -> Path:
    return out.with_name(f".{out.name}.{secrets.token_hex(4)}{_SUFFIX}")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
