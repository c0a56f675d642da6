"""What a killed evaluation had scored, in files that the next one goes on from.

Every second or so a file with the rows since the last one appears, whole or not at all. A row has
the sums of a document, or both answers to a question. Figures come back with the same bits.
"""

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from compress.errors import CompressError, writing
from compress.files import write_whole

SAVE_EVERY_S = 1.0

# (tokens, seconds) that a model has computed.
Spent = tuple[int, float]
_NOTHING: tuple[Spent, Spent] = ((0, 0.0), (0, 0.0))


class Scored:
    """Rows in the order of the work. ``folder`` None keeps nothing."""

    def __init__(self, folder: Path | None, remedy: str) -> None:
        """``remedy`` ends the message of a failed write."""
        self.rows: list[list[float]] = []
        self.spent = _NOTHING
        self._folder = folder
        self._remedy = remedy
        self._threads = 0
        self._saved = 0
        self._told = time.monotonic()

    def load(self, threads: int) -> None:
        """Finds what was scored with so many threads, which may change a bit; the rest goes."""
        self._threads = threads
        if self._folder is None:
            return
        for file in sorted(self._folder.glob("*.json")):
            if not self._take(file):
                file.unlink(missing_ok=True)
        self._saved = len(self.rows)

    def add(self, row: Sequence[float], spent: tuple[Spent, Spent]) -> None:
        """``spent`` are the totals of both models. Raises ``CompressError``."""
        self.rows.append(list(row))
        self.spent = spent
        if time.monotonic() - self._told >= SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Raises ``CompressError``."""
        self._told = time.monotonic()
        if self._folder is None or self._saved == len(self.rows):
            return
        value = {
            "threads": self._threads,
            "rows": self.rows[self._saved :],
            "spent": self.spent,
        }
        with writing(self._folder, self._remedy):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._folder / f"{self._saved:09}.json", json.dumps(value))
        self._saved = len(self.rows)

    def rescue(self) -> bool:
        """Saves while something else fails, which must not be hidden. Whether all rows are kept."""
        with suppress(CompressError):
            self.save()
        return self._folder is not None and self._saved == len(self.rows)

    def remove(self) -> None:
        """All is written elsewhere."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _take(self, file: Path) -> bool:
        """Adds the rows of ``file`` where they are the next ones."""
        with suppress(OSError, ValueError, LookupError, TypeError):
            if int(file.stem) != len(self.rows):
                return False
            value = json.loads(file.read_text(encoding="utf-8"))
            original, artefact = value["spent"]
            rows = [list(row) for row in value["rows"]]
            if value["threads"] != self._threads:
                return False
            self.spent = (int(original[0]), float(original[1])), (int(artefact[0]), artefact[1])
            self.rows += rows
            return True
        return False
