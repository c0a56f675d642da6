"""The two models of an evaluation, loaded as they serve, each with its speed."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from torch import Tensor

from compress.errors import CompressError
from compress.generated import threads
from compress.measure.figures import Side
from compress.measure.scored import Spent
from engine.config import CacheConfig, EngineConfig, KernelConfig
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


MakeScorer = Callable[[EngineConfig], ScorerLike]


class Timed:
    """A scorer that knows its speed."""

    def __init__(self, scorer: ScorerLike, folder: Path) -> None:
        self._scorer = scorer
        self._folder = folder
        self.spent: Spent = (0, 0.0)

    def logits(self, ids: list[int]) -> Tensor:
        """float32 [T, V]: row i predicts token i + 1."""
        start = time.perf_counter()
        logits = self._scorer.logits(ids)
        tokens, seconds = self.spent
        self.spent = tokens + len(ids), seconds + time.perf_counter() - start
        return logits

    def side(self) -> Side:
        """For the report, after at least one call of ``logits``."""
        report, (tokens, seconds) = self._scorer.report, self.spent
        return Side(
            folder=str(self._folder),
            weights=report.weights,
            head=report.head,
            kv_dtype=report.kv_dtype,
            weight_bytes=report.weight_bytes,
            tokens_per_second=round(tokens / seconds, 1),
            kernels=report.kernels,
        )


@contextmanager
def open_pair(
    original: Path, artefact: Path, *, window: int, kv_dtype: str, scorer: MakeScorer
) -> Iterator[tuple[Timed, Timed]]:
    """The original on an fp32 KV cache, and the artefact on ``kv_dtype``.

    Raises ``CompressError`` where they are no pair, or ``window`` tokens are too many for them.
    """
    # torch has one number of threads for the process: the same for both models.
    count = threads(sum(file.stat().st_size for file in original.glob("*.safetensors")))
    with (
        scorer(_config(original, "fp32", window, count)) as reference,
        scorer(_config(artefact, kv_dtype, window, count)) as candidate,
    ):
        _check(reference.report, candidate.report, window)
        yield Timed(reference, original), Timed(candidate, artefact)


def _config(folder: Path, kv_dtype: str, window: int, count: int) -> EngineConfig:
    blocks = -(-window // _BLOCK_SIZE)
    return EngineConfig(
        model_dir=folder,
        cache=CacheConfig(dtype=kv_dtype, block_size=_BLOCK_SIZE, blocks=blocks),
        kernels=KernelConfig(threads=count, allow_slow=True),
    )


def _check(original: ModelReport, artefact: ModelReport, window: int) -> None:
    most = min(original.context_length, artefact.context_length)
    if window > most:
        raise CompressError(f"{window} tokens are more than the model's context of {most}")
    if original.vocabulary_size != artefact.vocabulary_size:
        raise CompressError(
            f"the vocabularies differ, {original.vocabulary_size} and {artefact.vocabulary_size}: "
            "--against must name the artefact's own original"
        )
