"""What the gate keeps in the cache, by the hash of all that it depends on. Imports no torch."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.cache import CACHE_REMEDY
from compress.errors import CompressError, writing
from compress.files import locked
from compress.progress import Progress
from compress.sources import HashMemo, hash_sources


@dataclass(frozen=True, slots=True)
class Entries:
    """Of ``folder``, the cache."""

    folder: Path
    progress: Progress

    @contextmanager
    def entry(self, kind: str, parts: dict[str, Any]) -> Iterator[tuple[str, Path]]:
        """(key, file) of an entry, locked: a second process waits and then finds it.

        Raises ``CompressError`` where the cache cannot be written to.
        """
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        folder = self.folder / kind
        with writing(folder, CACHE_REMEDY):
            folder.mkdir(parents=True, exist_ok=True)
        busy = "another process measures the same"
        with locked(folder / f"{key}.lock", self.progress, busy, CACHE_REMEDY):
            yield key, folder / f"{key}.json"

    def memo(self) -> HashMemo:
        """Of files' hashes."""
        return HashMemo(self.folder / "hashes.json")

    def hashes(self, folder: Path) -> Mapping[str, str]:
        """Of a model's files. Raises ``CompressError``."""
        return hash_sources(folder, self.memo()).hashes

    def named_hashes(self, files: Sequence[str]) -> list[list[str]]:
        """(name without its ending, hash) of each. Raises ``CompressError``."""
        memo = self.memo()
        try:
            found = [[Path(name).stem, memo.sha256(Path(name))] for name in files]
        except OSError as error:
            raise CompressError(f"{error.filename} cannot be read: {error.strerror}") from error
        memo.save()
        return found
