"""What compression cost: an artefact against its original, both through the engine that serves."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from compress.errors import CompressError
from compress.measure.answers import is_right
from compress.measure.figures import Evaluation, TaskResult
from compress.measure.sides import MakeScorer, Timed, open_pair
from compress.measure.statistics import DocumentSums, compare, entropy, kl_estimate, summarise
from compress.measure.tasks import Task
from compress.measure.text import EvaluationText
from compress.progress import NoProgress, Progress
from engine.scoring import Scorer


def evaluate(
    artefact: Path,
    original: Path,
    text: EvaluationText,
    *,
    tasks: Sequence[Task] = (),
    kv_dtype: str = "auto",
    scorer: MakeScorer = Scorer,
    progress: Progress | None = None,
) -> Evaluation:
    """Compares ``artefact``, as it is served, with ``original`` on an fp32 KV cache.

    Args:
        artefact: a compressed folder.
        original: the folder that it was made of.
        text: documents to compare on.
        tasks: questions that both answer.
        kv_dtype: of the artefact's KV cache; ``auto`` is what the artefact asks for.
        scorer: makes a scorer; tests give their own.
        progress: is told of each document and question.

    Raises:
        CompressError, ModelLoadError: a folder or a text is not as needed.
    """
    longest = max([text.window, *(task.longest for task in tasks)])
    with open_pair(original, artefact, window=longest, kv_dtype=kv_dtype, scorer=scorer) as pair:
        work = _Work(*pair, progress or NoProgress())
        work.begin(text, tasks)
        sums = [work.document(list(ids)) for ids in text.documents]
        results = tuple(work.task(task) for task in tasks)
        broken = sum(not one.finite for one in sums)
        return Evaluation(
            original=work.original.side(),
            artefact=work.artefact.side(),
            data=text.source,
            data_sha256=text.sha256,
            window=text.window,
            documents=len(sums),
            broken=broken,
            quality=None if broken else summarise(sums),
            kl=None if broken else kl_estimate(sums),
            entropy=entropy(sums),
            tasks=results,
        )


class _Work:
    """Both models, and how far they are."""

    def __init__(self, original: Timed, artefact: Timed, progress: Progress) -> None:
        self.original = original
        self.artefact = artefact
        self._progress = progress
        self._items = self._done = 0
        self._start = time.perf_counter()

    def begin(self, text: EvaluationText, tasks: Sequence[Task]) -> None:
        questions = sum(len(task.questions) for task in tasks)
        self._items = len(text.documents) + questions
        detail = f"{len(text.documents)} documents" + (f", {questions} questions" * bool(questions))
        self._progress.phase("evaluating", detail)

    def document(self, ids: list[int]) -> DocumentSums:
        sums = compare(self.original.logits(ids), self.artefact.logits(ids), torch.tensor(ids))
        if not sums.original_is_finite:
            raise CompressError("the original gives NaN or infinite logits: it cannot be served")
        self._tick("documents")
        return sums

    def task(self, task: Task) -> TaskResult:
        right = lost = gained = 0
        for question in task.questions:
            before = is_right(self.original.logits, question)
            after = is_right(self.artefact.logits, question)
            right += before
            lost += before and not after
            gained += after and not before
            self._tick(task.name)
        return TaskResult(
            name=task.name, items=len(task.questions), chance=task.chance,
            original_correct=right, lost=lost, gained=gained,
        )  # fmt: skip

    def _tick(self, name: str) -> None:
        self._done += 1
        each = (time.perf_counter() - self._start) / self._done
        self._progress.layer(self._done, self._items, name, each * (self._items - self._done))
