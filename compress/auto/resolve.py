"""Turns a recipe that asks for ``auto`` into one with modifiers, and remembers what was found.

``<cache>/searches/<key>.json`` has the result, ``<key>.svg`` the picture of the frontier.
Imports no torch where the result is there.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec

from compress.auto.config import Frontier, Point
from compress.auto.plot import plot
from compress.cache import CACHE_REMEDY
from compress.errors import writing
from compress.files import locked, write_whole
from compress.gate.engine_identity import engine_identity
from compress.job import Job
from compress.methods import METHODS
from compress.progress import Progress
from compress.recipe import Modifier, Recipe
from compress.sources import HashMemo

# Raised whenever the same search may find something else.
_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search gives."""

    modifiers: tuple[Modifier, ...]
    frontier: Frontier


def resolve_auto(recipe: Recipe, model_dir: Path, cache_dir: Path, progress: Progress) -> Recipe:
    """``recipe`` itself where it asks for nothing; else with modifiers and the frontier.

    Raises:
        CompressError, ModelLoadError: the budget cannot be kept, or the model or disk is not as
            needed.
    """
    if recipe.auto is None or recipe.modifiers:
        return recipe
    folder = cache_dir.resolve() / "searches"
    with writing(folder, CACHE_REMEDY):
        folder.mkdir(parents=True, exist_ok=True)
    key = _key(recipe, model_dir, cache_dir, progress)
    busy = "another process searches the same"
    with locked(folder / f"{key}.lock", progress, busy, CACHE_REMEDY):
        found = _load(folder / f"{key}.json")
        if found is None:
            from compress.auto.run import search

            with _scratch(folder / f"{key}.work") as scratch:
                found = search(recipe, model_dir, scratch, progress)
            with writing(folder, CACHE_REMEDY):
                write_whole(folder / f"{key}.json", json.dumps(asdict(found)) + "\n")
        # The gate's limit is drawn, and no part of the key.
        with writing(folder, CACHE_REMEDY):
            write_whole(folder / f"{key}.svg", plot(found.frontier, recipe.gate.max_kl))
    for line in told(found.frontier, recipe.gate.max_kl):
        progress.phase("searching", line)
    progress.phase("searching", f"picture: {folder / f'{key}.svg'}")
    return replace(recipe, modifiers=found.modifiers, frontier=found.frontier)


def told(frontier: Frontier, max_kl: float) -> list[str]:
    """Lines for people: the frontier as a table, what was chosen, and what ended the search."""
    rows = [_row(point) for point in frontier.points]
    mix = ", ".join(f"{100 * share:.0f} % {scheme}" for scheme, share in frontier.chosen.schemes)
    least = frontier.bits_within(max_kl)
    within = "nowhere" if least is None else f"from {least:.3f} bits on"
    return [
        *rows,
        f"chosen: {mix}",
        f"the gate's limit of {max_kl:g} nats per token is kept {within}, as predicted",
        f"{frontier.measured} mixtures measured on {frontier.tokens} tokens; "
        f"ended by: {frontier.stopped}",
    ]


def _row(point: Point) -> str:
    speed = point.tokens_per_second
    return (
        f"{point.bits:7.3f} bits {point.nbytes / 1e6:9.2f} MB  KL {point.kl:9.6f} "
        f"(predicted {point.predicted_kl:9.6f})  "
        + ("" if speed is None else f"{speed:7.1f} tokens/s  ")
        + point.name
        + (" <- chosen" if point.chosen else "")
    )


def _key(recipe: Recipe, model_dir: Path, cache_dir: Path, progress: Progress) -> str:
    """Of the sources, the recipe without its gate, the text, GPTQ's version and this host; where
    speed is the budget, of the threads, too.
    """
    memo = HashMemo(cache_dir.resolve() / "hashes.json")
    job = Job.prepare(recipe, model_dir, memo, progress)
    parts: list[object] = [_VERSION, job.key, METHODS["gptq"].version, engine_identity()]
    if recipe.auto is not None and recipe.auto.budget == "tokens_per_second":
        # What torch makes its number of threads from.
        parts += [os.environ.get("OMP_NUM_THREADS"), len(os.sched_getaffinity(0))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A new ``folder``, removed at the end; what a killed search left there goes first.

    The search's lock is held.
    """
    with writing(folder, CACHE_REMEDY):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _load(file: Path) -> Found | None:
    """What was saved; None where there is nothing of this version."""
    try:
        return msgspec.convert(json.loads(file.read_text(encoding="utf-8")), Found)
    except (OSError, ValueError, msgspec.ValidationError):
        return None
