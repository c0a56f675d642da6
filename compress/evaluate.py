"""What compression cost: an artefact against its original, both through the engine that serves."""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

from compress.documents import read_windows
from compress.errors import CompressError
from compress.statistics import DocumentSums, Quality, compare, summarise
from engine.config import CacheConfig, EngineConfig, KernelConfig
from engine.scoring import Scorer
from engine.types import ModelReport

_BLOCK_SIZE = 16


class ScorerLike(Protocol):
    """What is used of ``engine.scoring.Scorer``."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    @property
    def report(self) -> ModelReport:
        """The loaded model."""
        ...

    def logits(self, token_ids: list[int]) -> Tensor:
        """float32 [T, V]: row i predicts token i + 1."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two models, as found in memory; the speed is that of scoring windows."""

    folder: str
    weights: str
    head: str
    kv_dtype: str
    weight_bytes: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """``data`` names the files, ``window`` is in tokens, ``documents`` counts what was used."""

    original: Side
    artefact: Side
    data: tuple[str, ...]
    window: int
    documents: int
    quality: Quality


def evaluate(
    artefact: Path,
    original: Path,
    data: Sequence[Path],
    *,
    window: int = 256,
    documents: int | None = None,
    kv_dtype: str = "auto",
    scorer: Callable[[EngineConfig], ScorerLike] = Scorer,
    watch: Callable[[Sequence[list[int]]], Iterable[list[int]]] = iter,
) -> Evaluation:
    """Compares ``artefact``, as it is served, with ``original`` on an fp32 KV cache.

    Args:
        artefact: a compressed folder.
        original: the folder that it was made of.
        data: text files, see ``read_windows``.
        window: how many tokens of a document are used.
        documents: how many documents are used at most; None uses all.
        kv_dtype: of the artefact's KV cache; ``auto`` is what the artefact asks for.
        scorer: makes a scorer; tests give their own.
        watch: wraps the documents to show progress.

    Raises:
        CompressError, ModelLoadError: a folder or a file is not as needed.
    """
    windows = read_windows(original, data, window=window, limit=documents)
    with (
        scorer(_config(original, "fp32", window)) as reference,
        scorer(_config(artefact, kv_dtype, window)) as candidate,
    ):
        _check(reference.report, candidate.report, window)
        timed = _Timed(reference), _Timed(candidate)
        sums: list[DocumentSums] = []
        for ids in watch(windows):
            sums.append(compare(timed[0].logits(ids), timed[1].logits(ids), torch.tensor(ids)))
        return Evaluation(
            original=timed[0].side(original),
            artefact=timed[1].side(artefact),
            data=tuple(str(file) for file in data),
            window=window,
            documents=len(windows),
            quality=summarise(sums),
        )


class _Timed:
    """A scorer that knows its speed."""

    def __init__(self, scorer: ScorerLike) -> None:
        self._scorer = scorer
        self._tokens = 0
        self._seconds = 0.0

    def logits(self, ids: list[int]) -> Tensor:
        start = time.perf_counter()
        logits = self._scorer.logits(ids)
        self._seconds += time.perf_counter() - start
        self._tokens += len(ids)
        return logits

    def side(self, folder: Path) -> Side:
        report = self._scorer.report
        return Side(
            folder=str(folder),
            weights=report.weights,
            head=report.head,
            kv_dtype=report.kv_dtype,
            weight_bytes=report.weight_bytes,
            tokens_per_second=round(self._tokens / self._seconds, 1),
        )


def _config(folder: Path, kv_dtype: str, window: int) -> EngineConfig:
    blocks = -(-window // _BLOCK_SIZE)
    return EngineConfig(
        model_dir=folder,
        cache=CacheConfig(dtype=kv_dtype, block_size=_BLOCK_SIZE, blocks=blocks),
        # torch has one number of threads for the process: the same for both models.
        kernels=KernelConfig(threads=os.cpu_count(), allow_slow=True),
    )


def _check(original: ModelReport, artefact: ModelReport, window: int) -> None:
    most = min(original.context_length, artefact.context_length)
    if window > most:
        raise CompressError(f"--window {window} is more than the model's context of {most} tokens")
    if original.vocabulary_size != artefact.vocabulary_size:
        raise CompressError(
            f"the vocabularies differ, {original.vocabulary_size} and {artefact.vocabulary_size}: "
            "--against must name the artefact's own original"
        )
