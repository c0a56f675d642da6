"""What compression cost: an artefact against its original, both through the engine that serves."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from compress.errors import CompressError
from compress.measure.answers import is_right
from compress.measure.figures import Evaluation, TaskResult
from compress.measure.scored import Scored
from compress.measure.sides import MakeScorer, Timed, open_pair
from compress.measure.statistics import DocumentSums, compare, entropy, summarise
from compress.measure.tasks import Question, Task
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
    scored: Scored | None = None,
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
        scored: keeps what was scored when this ends early, and has it from before.

    Raises:
        CompressError, ModelLoadError: a folder or a text is not as needed.
        KeyboardInterrupt: its note is what was kept.
    """
    longest = max([text.window, *(task.longest for task in tasks)])
    with open_pair(original, artefact, window=longest, kv_dtype=kv_dtype, scorer=scorer) as pair:
        work = _Work(*pair, progress or NoProgress(), scored or Scored(None, ""))
        work.begin(text, tasks)
        with work.kept():
            sums = [work.document(list(ids)) for ids in text.documents]
            results = tuple(work.task(task) for task in tasks)
        broken = sum(not one.finite for one in sums)
        quality, kl = (None, None) if broken else summarise(sums)
        return Evaluation(
            original=work.original.side(),
            artefact=work.artefact.side(),
            data=text.source,
            data_sha256=text.sha256,
            window=text.window,
            documents=len(sums),
            broken=broken,
            quality=quality,
            kl=kl,
            entropy=entropy(sums),
            tasks=results,
        )


class _Work:
    """Both models, and how far they are."""

    def __init__(
        self, original: Timed, artefact: Timed, progress: Progress, scored: Scored
    ) -> None:
        self.original = original
        self.artefact = artefact
        self._progress = progress
        self._scored = scored
        self._items = self._done = self._found = 0
        self._start = time.perf_counter()

    def begin(self, text: EvaluationText, tasks: Sequence[Task]) -> None:
        questions = sum(len(task.questions) for task in tasks)
        self._items = len(text.documents) + questions
        self._scored.load(torch.get_num_threads())
        self._found = len(self._scored.rows)
        self.original.spent, self.artefact.spent = self._scored.spent
        detail = f"{len(text.documents):,} documents"
        detail += f", {questions:,} questions" if questions else ""
        detail += f", of which {self._found:,} were scored before" if self._found else ""
        self._progress.phase("evaluating", detail)
        self._start = time.perf_counter()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Saves what was scored where the block does not come to its end."""
        try:
            yield
        except BaseException as error:
            if self._scored.rescue():
                found = f"{len(self._scored.rows):,} of {self._items:,} documents and questions"
                error.add_note(f"{found} are scored, and kept for the next run")
            raise

    def document(self, ids: list[int]) -> DocumentSums:
        def score() -> list[float]:
            sums = compare(self.original.logits(ids), self.artefact.logits(ids), torch.tensor(ids))
            if not sums.original_is_finite:
                raise CompressError(
                    "the original gives NaN or infinite logits: it cannot be served"
                )
            return sums.row()

        return DocumentSums.from_row(self._row("documents", score))

    def task(self, task: Task) -> TaskResult:
        right = lost = gained = 0
        for question in task.questions:

            def score(question: Question = question) -> list[float]:
                sides = (self.original, self.artefact)
                return [is_right(side.logits, question) for side in sides]

            before, after = map(bool, self._row(task.name, score))
            right += before
            lost += before and not after
            gained += after and not before
        return TaskResult(
            name=task.name, items=len(task.questions), chance=task.chance,
            original_correct=right, lost=lost, gained=gained,
        )  # fmt: skip

    def _row(self, name: str, score: Callable[[], list[float]]) -> list[float]:
        """The next row, scored now or before."""
        self._done += 1
        if self._done > self._found:
            self._scored.add(score(), (self.original.spent, self.artefact.spent))
            each = (time.perf_counter() - self._start) / (self._done - self._found)
            self._progress.layer(self._done, self._items, name, each * (self._items - self._done))
        return self._scored.rows[self._done - 1]
