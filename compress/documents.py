"""Text of files as token ids: windows for evaluation, and what calibration needs for its own."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

from compress.errors import CompressError
from engine.formats.checkpoint import read_json

_SEPARATOR = "\0"


def read_windows(
    model_dir: Path, files: Iterable[Path], *, window: int, limit: int | None
) -> list[list[int]]:
    """Token ids of the first ``limit`` windows, tokenised as ``model_dir`` does.

    A document, ended by NUL, gives its first ``window`` tokens; a file without NUL is cut into
    windows. Each begins with the bos token where the model has one; those that predict
    nothing are left out.

    Raises:
        CompressError, ModelLoadError: a file cannot be read, or there is no text.
    """
    encode, prefix = tokenizer(model_dir / "tokenizer.json"), bos_ids(model_dir)
    size = window - len(prefix)
    windows: list[list[int]] = []
    for file in files:
        text = read_text(file)
        documents = text.split(_SEPARATOR)
        for document in documents:
            ids = encode.encode(document, add_special_tokens=False).ids
            ends = range(0, len(ids), size) if len(documents) == 1 else range(1)
            cut = [prefix + ids[begin : begin + size] for begin in ends]
            windows += [window_ids for window_ids in cut if len(window_ids) > 1]
            if limit is not None and len(windows) >= limit:
                return windows[:limit]
    if not windows:
        raise CompressError("the data has no text to evaluate on: name other files with --data")
    return windows


def bos_ids(model_dir: Path) -> list[int]:
    """The token that texts begin with, where the model has one. Raises ``ModelLoadError``."""
    bos = read_json(model_dir / "config.json").get("bos_token_id")
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
