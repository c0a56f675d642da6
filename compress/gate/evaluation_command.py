"""``venturi evaluate``: one artefact, judged without a cache."""

from dataclasses import dataclass, replace
from pathlib import Path

from compress.documents import context_length
from compress.gate.config import Gate
from compress.gate.engine_identity import engine_identity
from compress.gate.folders import check_intact, check_original
from compress.gate.judging import calibration_ids
from compress.gate.report import Report
from compress.gate.verdict import judge
from compress.measure.evaluate import evaluate
from compress.measure.speed import measure_speed
from compress.measure.tasks import read_tasks
from compress.measure.text import EvaluationText, generate_text, read_files
from compress.progress import Progress
from compress.sources import HashMemo


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
    tasks = read_tasks(asked.original, asked.tasks)
    evaluation = evaluate(
        asked.artefact,
        asked.original,
        _text(asked, progress),
        tasks=tasks,
        kv_dtype=asked.kv_dtype,
        progress=progress,
    )
    if asked.speed:
        speed = measure_speed(asked.original, asked.artefact, asked.kv_dtype, progress)
        evaluation = replace(evaluation, speed=speed)
    return Report(
        key="",
        gate=asked.limits,
        verdict=judge(evaluation, asked.limits),
        evaluation=evaluation,
        engine=engine_identity(),
        original_known=known,
    )


def _text(asked: Asked, progress: Progress) -> EvaluationText:
    window = min(asked.window, context_length(asked.original))
    if asked.data:
        limit = asked.documents
        return read_files(asked.original, asked.data, window=window, limit=limit, seed=0)
    count = asked.documents or asked.limits.documents
    progress.phase("generating", f"{count} x {window} tokens to evaluate on")
    avoid = calibration_ids(asked.artefact)
    return generate_text(asked.original, documents=count, window=window, seed=0, avoid=avoid)
