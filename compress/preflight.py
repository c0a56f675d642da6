"""Before any work: what will be done to which layers, what executes them here, what it needs.

What cannot work is refused in one line with the remedy.
"""

import re
import shutil
from collections import Counter
from pathlib import Path

from compress import estimate
from compress.artefact import SHARD_BYTES
from compress.errors import CompressError
from compress.estimate import Sizes
from compress.host_speed import measure
from compress.memory import available_bytes
from compress.plan import Plan
from compress.recipe import Recipe
from compress.steps import DTYPES
from compress.treatment import Treatment
from compress.trial import Trial, kinds, try_out
from engine.client.defaults import GenerationDefaults
from engine.client.tokenizer import Tokenizer
from engine.formats import int_quantized
from engine.formats.checkpoint import Checkpoint

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def check(
    plan: Plan, recipe: Recipe, checkpoint: Checkpoint, folder: Path, remedy: str
) -> list[str]:
    """Lines for the user. ``folder`` will hold the output.

    Raises:
        CompressError: memory or disk is too small; ``remedy`` ends the disk's message.
        ModelLoadError: a file is missing or broken that the artefact needs to be served.
    """
    check_served(checkpoint.folder)
    sizes = Sizes.of(plan, recipe, checkpoint)
    generate = recipe.calibration is not None and recipe.calibration.source == "generate"
    disk = _check_space(sizes, folder, remedy)
    memory = _check_memory(sizes, checkpoint, generate=generate)
    name = next(iter(plan.treatments))
    dtype = DTYPES[checkpoint.info(f"{name}.weight").dtype]
    trials = {
        key: try_out(one, recipe.activations, dtype)
        for key, one in kinds(plan.treatments.values()).items()
    }
    seconds = _seconds(sizes, checkpoint, folder, trials, generate=generate)
    free = available_bytes()
    had = "" if free is None else f" of {_size(free)} free"
    return [
        *_layers(plan, trials),
        *_fallbacks(plan),
        _head(plan, recipe, checkpoint),
        f"needs about {_size(memory)} of memory{had}, {_size(disk)} of disk of "
        f"{_size(shutil.disk_usage(folder).free)} free, and roughly {_time(seconds)}",
    ]


def check_served(folder: Path) -> None:
    """Raises ``ModelLoadError`` for what the service would not start with, beside the weights."""
    Tokenizer.from_folder(folder)
    GenerationDefaults.from_folder(folder)


def _seconds(
    sizes: Sizes,
    checkpoint: Checkpoint,
    folder: Path,
    trials: dict[tuple[object, ...], Trial],
    *,
    generate: bool,
) -> float:
    plan, speed = sizes.plan, measure(folder)
    rounding = {key: trial.seconds for key, trial in trials.items()}
    seconds = estimate.rounding_seconds(plan, checkpoint, speed, rounding)
    if not plan.calibrated:
        return seconds
    return seconds + estimate.calibrating_seconds(sizes, speed, seconds, generate=generate)


def _layers(plan: Plan, trials: dict[tuple[object, ...], Trial]) -> list[str]:
    treatments = plan.treatments.values()
    counts = Counter((one.scheme_key, _zeros(one)) for one in treatments)
    lines = []
    for key, one in {(one.scheme_key, _zeros(one)): one for one in treatments}.items():
        trial = trials[one.scheme_key]
        slow = ", slow" if trial.slow and "slow" not in trial.product else ""
        what = f"{counts[key]} linears {one.storage}"
        how = f"{trial.execution}{_zeros(one)} by {trial.product}{slow}"
        lines.append(f"{what}, executed as {how}")
    return lines


def _zeros(treatment: Treatment) -> str:
    """What becomes of a pruned layer's zeros when it is executed."""
    if treatment.pruner is None:
        return ""
    left_out = treatment.sparse is not None and treatment.format == int_quantized.FORMAT
    return ", zeros left out where loading finds it faster" if left_out else ", zeros multiplied"


def _fallbacks(plan: Plan) -> list[str]:
    names = Counter(
        _NUMBER.sub("*", name) for name, one in plan.treatments.items() if one.fell_back
    )
    return [
        f"{name} ({count}): 8 bits per channel, since groups do not divide its rows"
        for name, count in names.items()
    ]


def _head(plan: Plan, recipe: Recipe, checkpoint: Checkpoint) -> str:
    dtype = checkpoint.info(f"{plan.head_weight}.weight").dtype.lower()
    tied = f", tied to {plan.head_weight}" if plan.spec.tied_head else ""
    loaded = ", int8 when loaded" if recipe.head == "int8" else ""
    kept = f"; {len(plan.kept)} linears stay as they are" if plan.kept else ""
    return f"{plan.head} stays {dtype}{tied}{loaded}{kept}"


def _check_memory(sizes: Sizes, checkpoint: Checkpoint, *, generate: bool) -> int:
    """What is needed; refuses what the host's free memory cannot hold."""
    needed = {
        "writing": (
            estimate.writing_bytes(sizes.plan, checkpoint, SHARD_BYTES),
            "free some, or use a larger machine",
        )
    }
    if sizes.tokens:
        needed["calibration"] = (
            estimate.calibration_bytes(sizes),
            "lower calibration.samples or calibration.length, or free some",
        )
    if sizes.tokens and generate:
        needed["generating calibration text"] = (
            estimate.generation_bytes(sizes, checkpoint),
            "give text of your own with calibration: {source: file, path: ...}",
        )
    free = available_bytes()
    for what, (size, remedy) in needed.items():
        if free is not None and size > free:
            raise CompressError(
                f"{what} needs about {size >> 20} MB of memory and {free >> 20} MB are free: "
                f"{remedy}"
            )
    return max(size for size, _ in needed.values())


def _check_space(sizes: Sizes, folder: Path, remedy: str) -> int:
    """What is needed; refuses a disk that is too small."""
    needed, free = estimate.disk_bytes(sizes), shutil.disk_usage(folder).free
    if free < needed:
        raise CompressError(
            f"{folder} has {free >> 20} MB free and {needed >> 20} MB are needed: "
            f"free some or {remedy}"
        )
    return needed


def _size(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.1f} GB" if nbytes >= 1 << 30 else f"{nbytes >> 20} MB"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
