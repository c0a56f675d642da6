"""The text that a verdict rests on: what the original writes, or the user's files; saved."""

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.documents import read_windows
from compress.errors import CompressError
from compress.files import write_whole
from compress.measure.figures import GENERATED
from compress.progress import Progress

# A run of so many equal tokens marks a document as seen in calibration.
NGRAM = 13
_ROUNDS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationText:
    """``documents`` are token ids; ``source`` names files, or is ``generated``."""

    source: tuple[str, ...]
    window: int
    documents: tuple[tuple[int, ...], ...]

    @property
    def sha256(self) -> str:
        """Of the token ids."""
        return hashlib.sha256(json.dumps(self.documents).encode()).hexdigest()

    def half(self, which: int) -> "EvaluationText":
        """Every second document: 0 for selection, 1 for confirmation."""
        return EvaluationText(
            source=self.source, window=self.window, documents=self.documents[which::2]
        )


def read_files(
    model_dir: Path,
    files: Sequence[Path],
    *,
    window: int,
    limit: int | None,
    seed: int,
    progress: Progress | None = None,
) -> EvaluationText:
    """``limit`` windows of the user's text, as many of each file as it has, drawn with ``seed``.

    They stay in the order of the files, so that halves are alike. Raises ``CompressError`` or
    ``ModelLoadError``.
    """
    found = [read_windows(model_dir, file, window=window, progress=progress) for file in files]
    shares = _shares([len(windows) for windows in found], limit)
    draw = random.Random(seed)
    documents: list[tuple[int, ...]] = []
    for windows, share in zip(found, shares, strict=True):
        drawn = sorted(draw.sample(range(len(windows)), share))
        documents += [tuple(windows[index]) for index in drawn]
    used = tuple(str(file) for file, share in zip(files, shares, strict=True) if share)
    return EvaluationText(source=used, window=window, documents=tuple(documents))


def _shares(sizes: list[int], limit: int | None) -> list[int]:
    """How many of each, as equal as ``sizes`` allow."""
    left = sum(sizes) if limit is None else min(limit, sum(sizes))
    shares = [0] * len(sizes)
    while left:
        for index, size in enumerate(sizes):
            if left and shares[index] < size:
                shares[index] += 1
                left -= 1
    return shares


def generate_text(
    model_dir: Path, *, documents: int, window: int, seed: int, avoid: Iterable[Sequence[int]] = ()
) -> EvaluationText:
    """What the original writes at temperature 1, without what ``avoid`` (calibration) has too.

    Raises ``CompressError`` where it keeps writing the same.
    """
    from compress.generated import generate

    seen = {gram for ids in avoid for gram in ngrams(ids)}
    kept: list[tuple[int, ...]] = []
    for step in range(_ROUNDS):
        missing = documents - len(kept)
        ids_SL = generate(model_dir, samples=missing, length=window, seed=_seed(seed, step))
        for ids in map(tuple, ids_SL.tolist()):
            grams = ngrams(ids)
            if not grams & seen:
                kept.append(ids)
                seen |= grams
        if len(kept) == documents:
            text = tuple(kept)
            return EvaluationText(source=(GENERATED,), window=window, documents=text)
    raise CompressError(
        f"the model repeats itself: only {len(kept)} of {documents} documents that it wrote are "
        "new: give the gate text in gate.data"
    )


def ngrams(ids: Sequence[int]) -> set[tuple[int, ...]]:
    """Of ``NGRAM`` tokens."""
    return {tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)}


def load(file: Path) -> EvaluationText | None:
    """What ``save`` wrote; None where there is nothing that can be read."""
    try:
        value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return EvaluationText(
            source=tuple(value["source"]),
            window=int(value["window"]),
            documents=tuple(tuple(map(int, ids)) for ids in value["documents"]),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def save(text: EvaluationText, file: Path) -> None:
    """Whole or not at all. Raises ``OSError``."""
    value = {"source": text.source, "window": text.window, "documents": text.documents}
    write_whole(file, json.dumps(value) + "\n")


def _seed(seed: int, step: int) -> int:
    """Far from the recipe's own, with which calibration text is generated."""
    digest = hashlib.sha256(f"gate {seed} {step}".encode()).digest()
    return int.from_bytes(digest[:4])
