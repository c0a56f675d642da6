"""The files that an artefact is made of, and their hashes. Imports no torch."""

import hashlib
import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from compress.errors import CompressError
from compress.files import write_whole

MANIFEST_NAME = "venturi.json"
CALIBRATION_NAME = "calibration.json"
REPORT_NAME = "report.json"
WEIGHT_INDEX = "model.safetensors.index.json"
_SINGLE_WEIGHTS = "model.safetensors"
_NEVER_COPIED = ("config.json", MANIFEST_NAME, CALIBRATION_NAME, REPORT_NAME)
# Data only: no pickles (.bin, .pt) and no code (.py).
_COPIED_SUFFIXES = ("", ".json", ".txt", ".jinja", ".md", ".model", ".tiktoken")
_CHUNK_BYTES = 1 << 20
# A file changed twice within its time stamp's granularity keeps the stamp.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Sources:
    """File name -> sha256 of all files that the artefact depends on, and their state then."""

    folder: Path
    hashes: dict[str, str]
    stamps: dict[str, tuple[int, int, int]]

    def check_unchanged(self) -> None:
        """Raises ``CompressError`` where a file was written to since it was hashed."""
        for name, stamp in self.stamps.items():
            path = self.folder / name
            if not path.exists() or _stamp(path) != stamp:
                raise CompressError(f"{path} changed while it was compressed: start again")


class HashMemo:
    """sha256 of files, remembered by path, size, time and inode in ``path`` (None: not)."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, list[object]] = {}
        self._changed = False
        try:
            known = json.loads(path.read_text(encoding="utf-8")) if path else {}
            self._known = known if isinstance(known, dict) else {}
        except (OSError, ValueError):
            # A lost memo costs time only.
            self._known = {}

    def sha256(self, file: Path) -> str:
        """Hex digest. Raises ``OSError``."""
        key, stamp = str(file.resolve()), _stamp(file)
        entry = self._known.get(key)
        if isinstance(entry, list) and entry[:-1] == list(stamp):
            return str(entry[-1])
        digest = hashlib.sha256()
        with file.open("rb", buffering=0) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
        if time.time_ns() - stamp[1] > _SETTLED_NS:
            self._known[key] = [*stamp, digest.hexdigest()]
            self._changed = True
        return digest.hexdigest()

    def save(self) -> None:
        """Writes the memo in one step, where there is something new."""
        if self._path is None or not self._changed:
            return
        # Hits must work in a cache folder that only others may write.
        with suppress(OSError):
            write_whole(self._path, json.dumps(self._known, indent=0))


def hash_sources(folder: Path, memo: HashMemo) -> Sources:
    """Hashes weights, config and what is copied. Raises ``CompressError``."""
    hashes, stamps = {}, {}
    try:
        if not folder.is_dir():
            raise CompressError(f"{folder} is not a folder: name a Hugging Face model folder")
        for name in ["config.json", *_weight_names(folder), *copied_names(folder)]:
            # The checkpoint reader says best what a missing file means.
            if (folder / name).exists():
                stamps[name] = _stamp(folder / name)
                hashes[name] = memo.sha256(folder / name)
    except OSError as error:
        raise CompressError(f"{error.filename} cannot be read: {error.strerror}") from error
    memo.save()
    return Sources(folder, hashes, stamps)


def is_model_file(name: str) -> bool:
    """Whether tokens or logits depend on the file."""
    return name.endswith(".safetensors") or name in ("config.json", "tokenizer.json")


def model_hashes(folder: Path) -> dict[str, str]:
    """Of the model files, read anew. Raises ``CompressError``."""
    found = hash_sources(folder, HashMemo(None)).hashes
    return {name: digest for name, digest in found.items() if is_model_file(name)}


def copied_names(folder: Path) -> list[str]:
    """Files that go into the artefact as they are: tokenizer, template, licence and such."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file()
        and path.suffix in _COPIED_SUFFIXES
        and not path.name.startswith(".")
        and not path.name.endswith(".index.json")
        and path.name not in _NEVER_COPIED
    )


def _weight_names(folder: Path) -> list[str]:
    """Weight files as ``engine.formats.checkpoint`` finds them, which judges their content."""
    if not (folder / WEIGHT_INDEX).exists():
        return [_SINGLE_WEIGHTS]
    try:
        index = json.loads((folder / WEIGHT_INDEX).read_text(encoding="utf-8"))
        return [WEIGHT_INDEX, *sorted({str(name) for name in index["weight_map"].values()})]
    except (ValueError, LookupError, TypeError, AttributeError):
        return [WEIGHT_INDEX]


def _stamp(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino
