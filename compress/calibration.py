"""Calibration samples: windows of token ids from the user's files."""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from compress.documents import bos_ids, read_text, tokenizer
from compress.errors import CompressError


def read_samples(
    model_dir: Path, files: Sequence[Path], *, samples: int, length: int, seed: int
) -> Tensor:
    """``samples`` windows [S, L] of the files' text.

    A ``.jsonl`` file has an object with ``text`` in each line; documents in others are
    separated by NUL. They follow each other in an order drawn by ``seed``, each behind the
    bos token, until there are enough.

    Raises:
        CompressError: a file cannot be read, or has too little text.
    """
    encode, bos = tokenizer(model_dir / "tokenizer.json"), bos_ids(model_dir)
    documents = [document for file in files for document in _documents(file)]
    random.Random(seed).shuffle(documents)
    ids: list[int] = []
    for document in documents:
        ids += bos + encode.encode(document, add_special_tokens=False).ids
        if len(ids) >= samples * length:
            return torch.tensor(ids[: samples * length]).view(samples, length)
    raise CompressError(
        f"calibration needs {samples} x {length} tokens, the files have {len(ids)}: "
        "add text, or lower calibration.samples"
    )


def _documents(file: Path) -> Iterable[str]:
    text = read_text(file)
    if file.suffix != ".jsonl":
        return [document for document in text.split("\0") if document]
    return [_line(file, i + 1, line) for i, line in enumerate(text.splitlines()) if line.strip()]


def _line(file: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise CompressError(f"{file}:{number}: not JSON: {error}") from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise CompressError(f'{file}:{number}: must be an object with "text"')
    return text
