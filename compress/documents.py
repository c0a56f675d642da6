"""Text of files as token ids: windows for evaluation, and what calibration needs for its own."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from compress.errors import CompressError
from compress.progress import NoProgress, Progress
from engine.client.files import read_optional_json

_SEPARATOR = "\0"
# Documents that are tokenised at once.
_BATCH = 1000
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")


def context_length(model_dir: Path) -> int:
    """Positions of the model, as far as config.json tells; loading judges the rest."""
    config = read_optional_json(model_dir / "config.json")
    found = [config[key] for key in _CONTEXT_KEYS if isinstance(config.get(key), int)]
    return max(2, min(found, default=1 << 30))


def read_windows(
    model_dir: Path, file: Path, *, window: int, progress: Progress | None = None
) -> list[list[int]]:
    """Token ids of all windows of ``file``, tokenised as ``model_dir`` does.

    A document gives its first ``window`` tokens; a text file of a single document is cut into
    windows. Each begins with the bos token where the model has one; those that predict nothing
    are left out. ``progress`` is told of many documents.

    Raises:
        CompressError, ModelLoadError: the file cannot be read, or has no text.
    """
    encode, prefix = tokenizer(model_dir / "tokenizer.json"), bos_ids(model_dir)
    size = window - len(prefix)
    windows: list[list[int]] = []
    documents = read_documents(file)
    whole = len(documents) == 1 and file.suffix != ".jsonl"
    for ids in _encoded(encode, documents, file, progress or NoProgress()):
        begins = range(0, len(ids), size) if whole else range(1)
        cut = [prefix + ids[begin : begin + size] for begin in begins]
        windows += [window_ids for window_ids in cut if len(window_ids) > 1]
    if not windows:
        raise CompressError(f"{file} has no text to evaluate on: name another file")
    return windows


def _encoded(
    encoder: Tokenizer, documents: list[str], file: Path, progress: Progress
) -> Iterator[list[int]]:
    """Token ids of each document, without special tokens."""
    items, start = len(documents), time.perf_counter()
    if items > _BATCH:
        progress.phase("reading", f"{items:,} documents of {file}")
    for begin in range(0, items, _BATCH):
        for encoding in encoder.encode_batch(
            documents[begin : begin + _BATCH], add_special_tokens=False
        ):
            yield encoding.ids
        done = min(items, begin + _BATCH)
        if items > _BATCH:
            left = (time.perf_counter() - start) * (items - done) / done
            progress.layer(done, items, "documents", left)


def read_documents(file: Path) -> list[str]:
    """A ``.jsonl`` file has an object with ``text`` in each line; documents in others are ended
    by NUL. Raises ``CompressError``.
    """
    if file.suffix == ".jsonl":
        return [_text_of(file, number, line) for number, line in read_json_lines(file)]
    return [document for document in read_text(file).split(_SEPARATOR) if document]


def read_json_lines(file: Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a ``.jsonl`` file with their line numbers. Raises ``CompressError``."""
    found = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise CompressError(f"{file}:{number}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise CompressError(f"{file}:{number}: must be an object")
        found.append((number, value))
    return found


def _text_of(file: Path, number: int, line: dict[str, Any]) -> str:
    if not isinstance(line.get("text"), str):
        raise CompressError(f'{file}:{number}: must be an object with "text"')
    return str(line["text"])


def bos_ids(model_dir: Path) -> list[int]:
    """The token that texts begin with, where the model has one. Raises ``ModelLoadError``."""
    bos = read_optional_json(model_dir / "config.json").get("bos_token_id")
    return [bos] if isinstance(bos, int) else []


def tokenizer(path: Path) -> Tokenizer:
    """Raises ``CompressError``."""
    if not path.is_file():
        raise CompressError(f"{path} is missing: the text cannot be tokenised")
    try:
        found = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CompressError(f"{path} is broken: {error}") from error
    found.no_truncation()
    found.no_padding()
    return found


def read_text(file: Path) -> str:
    """Raises ``CompressError``."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise CompressError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CompressError(f"{file} is not text in UTF-8") from error
