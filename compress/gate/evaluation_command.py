"""``venturi evaluate``: one artefact, measured anew whatever the cache has."""

from dataclasses import dataclass, replace
from pathlib import Path

from compress.documents import context_length
from compress.gate.config import Gate
from compress.gate.engine_identity import engine_identity
from compress.gate.folders import check_intact, check_original
from compress.gate.judging import Judge
from compress.gate.report import Report
from compress.gate.verdict import judge
from compress.measure.tasks import read_tasks
from compress.measure.text import EvaluationText, read_files
from compress.progress import Progress
from compress.sources import HashMemo
from engine.formats.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is asked of an artefact; ``data`` () lets the original write the text.

    ``documents`` None uses all of the data; ``speed`` measures generating too.
    """

    artefact: Path
    original: Path
    limits: Gate
    cache_dir: Path
    data: tuple[Path, ...] = ()
    tasks: tuple[Path, ...] = ()
    documents: int | None = None
    window: int = 256
    kv_dtype: str = "auto"
    speed: bool = False


def evaluate_folder(asked: Asked, progress: Progress) -> Report:
    """Raises ``CompressError`` or ``ModelLoadError``: a folder or a file is not as needed."""
    progress.phase("hashing", f"{asked.artefact} and {asked.original}")
    memo = HashMemo(asked.cache_dir / "hashes.json")
    known = check_original(asked.artefact, asked.original, memo, "--against")
    check_intact(asked.artefact, memo)
    for folder in (asked.original, asked.artefact):
        Checkpoint.open(folder)
    read_tasks(asked.original, asked.tasks)
    judging = _judging(asked, progress)
    text = _text(asked, judging)
    key, evaluation = judging.evaluation(asked.artefact, text, None, anew=True)
    return Report(
        key=key,
        gate=judging.gate,
        verdict=judge(evaluation, asked.limits),
        evaluation=evaluation,
        engine=engine_identity(),
        original_known=known,
    )


def _judging(asked: Asked, progress: Progress) -> Judge:
    gate = replace(
        asked.limits,
        tasks=tuple(map(str, asked.tasks)),
        documents=asked.documents or asked.limits.documents,
        length=asked.window,
        speed=asked.speed,
    )
    return Judge(
        original=asked.original,
        gate=gate,
        seed=0,
        kv_dtype=asked.kv_dtype,
        cache_dir=asked.cache_dir,
        progress=progress,
    )


def _text(asked: Asked, judging: Judge) -> EvaluationText:
    if not asked.data:
        return judging.text(asked.artefact)
    window = min(asked.window, context_length(asked.original))
    limit = asked.documents
    return read_files(
        asked.original, asked.data, window=window, limit=limit, seed=0, progress=judging.progress
    )
