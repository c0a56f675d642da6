"""Judges an artefact, with what was measured before where nothing has changed since.

``<cache>/texts`` keeps what originals wrote, ``<cache>/evaluations`` what was measured: a changed
limit is judged anew without measuring, a killed evaluation goes on. Imports no torch until
something is measured.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec

from compress.cache import CACHE_REMEDY
from compress.documents import context_length
from compress.errors import CompressError, writing
from compress.files import write_whole
from compress.gate.config import FEWEST_DOCUMENTS, Gate
from compress.gate.engine_identity import engine_identity
from compress.gate.entries import Entries
from compress.gate.folders import check_intact
from compress.gate.report import Report, Restored, write_report
from compress.gate.verdict import Verdict, judge, not_achievable
from compress.measure import text as texts
from compress.measure.figures import Evaluation, Speed
from compress.measure.scored import Scored
from compress.measure.tasks import Task, read_tasks
from compress.measure.text import EvaluationText
from compress.progress import Progress
from compress.sources import CALIBRATION_NAME, MANIFEST_NAME
from engine.client.files import read_optional_json

# Of what is measured and how text is generated.
_METHOD_VERSION = 1


# Halves of text and questions; all of them where nothing may be restored.
SELECTION: Literal[0] = 0
CONFIRMATION: Literal[1] = 1
Half = Literal[0, 1] | None


@dataclass(frozen=True, slots=True)
class Measured:
    """An evaluation, its key and what the limits make of it."""

    key: str
    evaluation: Evaluation
    verdict: Verdict

    @property
    def tolerable(self) -> float:
        """Share of the KL that may stay; 1 where the KL passes, or there is none."""
        check = self.verdict.kl
        return check.limit / check.high if check is not None and check.high > check.limit else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Judges artefacts of ``original``; ``seed`` is the recipe's, ``kv_dtype`` what will serve."""

    original: Path
    gate: Gate
    seed: int
    kv_dtype: str
    cache_dir: Path
    progress: Progress

    def check_data(self) -> None:
        """Reads the user's files before the work: each half needs text and questions.

        Raises ``CompressError`` or ``ModelLoadError``.
        """
        halves = 2 if self.gate.restore else 1
        if self.gate.data:
            found, needed = len(self._users_text().documents), halves * FEWEST_DOCUMENTS
            if found < needed:
                raise CompressError(
                    f"gate.data has {found} windows of text, fewer than {needed}: name more text, "
                    "or set gate.documents or gate.length"
                )
        for task in self._tasks():
            if len(task.questions) < halves:
                raise CompressError(
                    f"{task.name} has 1 question, and gate.restore needs 2: add questions"
                )

    def report(
        self,
        artefact: Path,
        half: Half = None,
        *,
        restored: tuple[Restored, ...] = (),
        kept_share: float = 1.0,
        achievable: bool = True,
        original_known: bool = True,
    ) -> Report:
        """The verdict, which is also written beside the artefact.

        Raises ``CompressError`` or ``ModelLoadError``: data or a folder is not as needed.
        """
        found = self.measure(artefact, half)
        report = Report(
            key=found.key,
            gate=self.gate,
            verdict=found.verdict if achievable else not_achievable(found.verdict),
            evaluation=found.evaluation,
            engine=engine_identity(),
            restored=restored,
            kept_share=kept_share,
            original_known=original_known,
        )
        write_report(report, artefact)
        return report

    def measure(self, artefact: Path, half: Half) -> Measured:
        """What the limits make of a half of text and questions. Raises as ``report``."""
        check_intact(artefact, self._entries.memo())
        text = self.text(artefact)
        key, evaluation = self.evaluation(artefact, text if half is None else text.half(half), half)
        return Measured(key, evaluation, judge(evaluation, self.gate))

    def text(self, artefact: Path) -> EvaluationText:
        """The user's text, or what the original wrote, now or before."""
        if self.gate.data:
            return self._users_text()
        window, documents = self._window, self._documents
        calibration = calibration_ids(artefact)
        parts = {
            "method": _METHOD_VERSION,
            "original": self._entries.hashes(self.original),
            "gate": [documents, window, self.seed],
            "calibration": calibration,
        }
        with self._entries.entry("texts", parts) as (_, file):
            if (saved := texts.load(file)) is not None:
                return saved
            detail = f"{documents} x {window} tokens to evaluate on"
            self.progress.phase("generating", detail)
            text = texts.generate_text(
                self.original,
                documents=documents,
                window=window,
                seed=self.seed,
                avoid=calibration,
            )
            with writing(file.parent, CACHE_REMEDY):
                texts.save(text, file)
            return text

    @property
    def _window(self) -> int:
        return min(self.gate.length, context_length(self.original))

    @property
    def _documents(self) -> int:
        return self.gate.documents * (2 if self.gate.restore else 1)

    def _users_text(self) -> EvaluationText:
        files = [Path(name) for name in self.gate.data]
        return texts.read_files(
            self.original,
            files,
            window=self._window,
            limit=self._documents,
            seed=self.seed,
            progress=self.progress,
        )

    def _tasks(self) -> tuple[Task, ...]:
        return read_tasks(self.original, [Path(name) for name in self.gate.tasks])

    def evaluation(
        self, artefact: Path, text: EvaluationText, half: Half, *, anew: bool = False
    ) -> tuple[str, Evaluation]:
        """What was measured, now or before, and its key; ``anew``: now, and not kept.

        A run that is killed leaves what it scored to the next one.
        """
        parts = {
            "method": _METHOD_VERSION,
            "original": self._entries.hashes(self.original),
            "artefact": self._entries.hashes(artefact),
            "runtime": read_optional_json(artefact / MANIFEST_NAME).get("runtime"),
            "text": [text.sha256, text.window],
            "tasks": [self._entries.named_hashes(self.gate.tasks), half],
            "kv_dtype": self.kv_dtype,
            "engine": engine_identity(),
        }
        with self._entries.entry("evaluations", parts) as (key, file):
            found = None if anew else _load(file)
            scored = Scored(file.with_suffix(".scored"), CACHE_REMEDY)
            evaluation = found or self._measured(artefact, text, half, scored)
            if found is None and not anew:
                _save(evaluation, file)
            scored.remove()
            if self.gate.speed and half != SELECTION and not evaluation.speed:
                evaluation = replace(evaluation, speed=self._speed(artefact))
                if not anew:
                    _save(evaluation, file)
            return key, self._as_asked(evaluation, artefact)

    def _measured(
        self, artefact: Path, text: EvaluationText, half: Half, scored: Scored
    ) -> Evaluation:
        from compress.measure.evaluate import evaluate

        tasks = self._tasks()
        return evaluate(
            artefact,
            self.original,
            text,
            tasks=tasks if half is None else [task.half(half) for task in tasks],
            kv_dtype=self.kv_dtype,
            progress=self.progress,
            scored=scored,
        )

    def _as_asked(self, found: Evaluation, artefact: Path) -> Evaluation:
        """What was measured of the same files elsewhere is that of these."""
        return replace(
            found,
            original=replace(found.original, folder=str(self.original)),
            artefact=replace(found.artefact, folder=str(artefact)),
            speed=found.speed if self.gate.speed else (),
        )

    def _speed(self, artefact: Path) -> tuple[Speed, ...]:
        from compress.measure.speed import measure_speed

        return measure_speed(self.original, artefact, self.kv_dtype, self.progress)

    @property
    def _entries(self) -> Entries:
        return Entries(self.cache_dir, self.progress)


def calibration_ids(artefact: Path) -> list[list[int]]:
    """Token ids of the calibration text, [] where there was none."""
    path = artefact / CALIBRATION_NAME
    if not path.exists():
        return []
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return [[int(token) for token in ids] for ids in value]
    except (OSError, ValueError, TypeError) as error:
        raise CompressError(f"{path} cannot be read: {error}: compress again") from error


def _save(evaluation: Evaluation, file: Path) -> None:
    with writing(file.parent, CACHE_REMEDY):
        write_whole(file, json.dumps(asdict(evaluation), allow_nan=False) + "\n")


def _load(file: Path) -> Evaluation | None:
    """What was saved; None where there is nothing of this version."""
    try:
        return msgspec.convert(json.loads(file.read_text(encoding="utf-8")), Evaluation)
    except (OSError, ValueError, msgspec.ValidationError):
        return None
