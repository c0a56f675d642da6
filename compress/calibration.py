"""Calibration samples: windows of token ids from the user's files."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from compress.documents import bos_ids, read_documents, tokenizer
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
    documents = [document for file in files for document in read_documents(file)]
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
