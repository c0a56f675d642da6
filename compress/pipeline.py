"""The whole job: a model folder and a recipe become a published artefact."""

import json
from contextlib import ExitStack
from pathlib import Path

import torch

from compress import preflight
from compress.artefact import ArtefactWriter
from compress.auto.resolve import resolve_auto
from compress.calibrated import CalibratedRun, calibration_record
from compress.errors import writing
from compress.generated import threads
from compress.job import Job
from compress.manifest import Manifest
from compress.memory import PeakMemory
from compress.plan import Plan, make_plan
from compress.progress import NoProgress, Progress
from compress.recipe import Recipe, resolve
from compress.sources import CALIBRATION_NAME, HashMemo
from compress.staging import check_replaceable, publish, staging_folder
from compress.store import open_store
from engine.formats.checkpoint import Checkpoint


def compress(
    recipe: Recipe | str,
    model_dir: Path | str,
    out_dir: Path | str,
    *,
    progress: Progress | None = None,
) -> Manifest:
    """Compresses ``model_dir`` into the folder ``out_dir``, which appears whole or not at all.

    Args:
        recipe: a ``Recipe``, a preset's name or the path of a YAML file.
        model_dir: a Hugging Face folder with safetensors weights.
        out_dir: a new or empty folder, or an artefact, which is replaced.
        progress: is told what happens; None tells nobody.

    Raises:
        CompressError: the recipe, the model or the disk is not as needed.
        ModelLoadError: the model's files are broken.
    """
    progress = progress or NoProgress()
    recipe = resolve(recipe) if isinstance(recipe, str) else recipe
    check_replaceable(Path(out_dir))
    if recipe.auto is not None:
        from compress.cache import default_cache_dir

        recipe = resolve_auto(recipe, Path(model_dir), default_cache_dir(), progress)
    job = Job.prepare(recipe, Path(model_dir), HashMemo(None), progress)
    return run(job, Path(out_dir), progress, remedy="name another folder with --out")


def run(job: Job, out: Path, progress: Progress, *, remedy: str) -> Manifest:
    """As ``compress``, for a prepared job, whatever ``out`` holds.

    ``remedy`` ends the message of a failed write.
    """
    out = out.resolve()
    checkpoint = Checkpoint.open(job.sources.folder)
    plan = make_plan(job.recipe, checkpoint)
    with PeakMemory() as memory, ExitStack() as stack:
        if plan.calibrated:
            torch.set_num_threads(threads(sum(i.nbytes for i in checkpoint.tensors.values())))
        with writing(out.parent, remedy):
            out.parent.mkdir(parents=True, exist_ok=True)
            for line in preflight.check(plan, job.recipe, checkpoint, out.parent, remedy):
                progress.phase("planning", line)
        calibrated = None
        if plan.calibrated:
            with writing(out.parent, remedy):
                layers = len(plan.spec.layers)
                store = stack.enter_context(open_store(out, job.key, layers))
                calibrated = CalibratedRun(job.recipe, plan, checkpoint, store)
                calibrated.run(progress)
        else:
            progress.phase("compressing", f"{len(plan.treatments)} layers of {checkpoint.folder}")
        return _publish(job, checkpoint, plan, calibrated, out, progress, memory, remedy)


def _publish(
    job: Job,
    checkpoint: Checkpoint,
    plan: Plan,
    calibrated: CalibratedRun | None,
    out: Path,
    progress: Progress,
    memory: PeakMemory,
    remedy: str,
) -> Manifest:
    with ExitStack() as stack:
        with writing(out.parent, remedy):
            folder = stack.enter_context(staging_folder(out))
            store = None if calibrated is None else calibrated.store
            writer = ArtefactWriter(job, checkpoint, plan, folder, store)
            writer.write_weights(progress)
            writer.write_files()
            if calibrated is not None:
                writer.calibration = calibration_record(job.recipe, calibrated.ids_SL)
                text = json.dumps(calibrated.ids_SL.tolist())
                (folder / CALIBRATION_NAME).write_text(text + "\n", encoding="utf-8")
        progress.phase("verifying", str(folder))
        writer.verify()
        job.sources.check_unchanged()
        manifest = writer.manifest(memory)
        progress.phase("publishing", str(out))
        with writing(out.parent, remedy):
            manifest.write(folder)
            publish(folder, out)
    return manifest
