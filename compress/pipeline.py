"""The whole job: a model folder and a recipe become a published artefact."""

import shutil
from pathlib import Path

from compress.artefact import ArtefactWriter
from compress.errors import CompressError, writing
from compress.job import Job
from compress.manifest import Manifest
from compress.memory import PeakMemory
from compress.plan import make_plan
from compress.progress import NoProgress, Progress
from compress.recipe import Recipe, resolve
from compress.sources import HashMemo
from compress.staging import check_replaceable, publish, staging_folder
from engine.formats.checkpoint import Checkpoint

# Config, tokenizer and manifest beside the weights.
_SPARE_BYTES = 64 << 20


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
    job = Job.prepare(recipe, Path(model_dir), HashMemo(None), progress)
    check_replaceable(Path(out_dir))
    return run(job, Path(out_dir), progress, remedy="name another folder with --out")


def run(job: Job, out: Path, progress: Progress, *, remedy: str) -> Manifest:
    """As ``compress``, for a prepared job, whatever ``out`` holds.

    ``remedy`` ends the message of a failed write.
    """
    out = out.resolve()
    checkpoint = Checkpoint.open(job.sources.folder)
    plan = make_plan(job.recipe, checkpoint)
    with writing(out.parent, remedy), PeakMemory() as memory, staging_folder(out) as folder:
        _check_space(folder, plan.out_bytes + _SPARE_BYTES, remedy)
        writer = ArtefactWriter(job, checkpoint, plan, folder)
        progress.phase("compressing", f"{len(plan.modifiers)} layers of {checkpoint.folder}")
        writer.write_weights(progress)
        writer.write_files()
        progress.phase("verifying", str(folder))
        writer.verify()
        job.sources.check_unchanged()
        manifest = writer.manifest(memory)
        manifest.write(folder)
        progress.phase("publishing", str(out))
        publish(folder, out)
    return manifest


def _check_space(folder: Path, needed: int, remedy: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CompressError(
            f"{folder.parent} has {free >> 20} MB free and {needed >> 20} MB are needed: "
            f"free some or {remedy}"
        )
