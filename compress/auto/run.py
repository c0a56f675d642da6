"""A search from a model folder and a recipe to modifiers and a frontier."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from compress.auto.candidates import ORIGINAL, SCHEMES, modifiers, tied_groups, uniform
from compress.auto.final_kl import FinalKl
from compress.auto.knapsack import Option
from compress.auto.library import Library
from compress.auto.resolve import Found
from compress.auto.search import Problem, Search, group_costs
from compress.cache import CACHE_REMEDY
from compress.calibration import read_samples
from compress.errors import CompressError, writing
from compress.generated import generate, threads
from compress.plan import Plan, make_plan
from compress.progress import Progress
from compress.recipe import Recipe
from engine.blocks import Blocks
from engine.formats.checkpoint import Checkpoint

# Windows beside those of calibration, on which mixtures are judged.
SELECTION = 16


def search(recipe: Recipe, model_dir: Path, scratch: Path, progress: Progress) -> Found:
    """``scratch`` is a folder for roundings, which are removed at the end.

    Raises ``CompressError`` or ``ModelLoadError``.
    """
    assert recipe.auto is not None
    begin, checkpoint = time.perf_counter(), Checkpoint.open(model_dir)
    torch.set_num_threads(threads(sum(info.nbytes for info in checkpoint.tensors.values())))
    plans = {scheme: make_plan(uniform(recipe, scheme), checkpoint) for scheme in SCHEMES}
    plan = plans["w8a8"]
    groups = tied_groups(plan)
    progress.phase(
        "searching",
        f"{len(groups)} groups of linears, {len(SCHEMES) + 1} schemes: all are rounded in each",
    )
    ids_SL = _samples(recipe, plan, checkpoint, progress)
    blocks = Blocks.open(checkpoint)
    with writing(scratch, CACHE_REMEDY), tempfile.TemporaryDirectory(dir=scratch) as folder:
        library = Library(checkpoint, plans, groups, Path(folder))
        library.fill(blocks, ids_SL[:-SELECTION], progress)
        nbytes = [
            {scheme: one.nbytes for scheme, one in roundings.items()}
            for roundings in library.roundings
        ]
        weights = [sum(plan.weights[module] for module in group.modules) for group in groups]
        budget = _budget(recipe, nbytes, sum(weights))
        kl = FinalKl(blocks, ids_SL[-SELECTION:])
        progress.phase("searching", "what each group costs alone")
        costs = group_costs(kl, library, groups, progress)
        problem = Problem(
            auto=recipe.auto,
            groups=groups,
            options=_options(nbytes, costs),
            nbytes=nbytes,
            weights=weights,
            budget=budget,
        )
        progress.phase("searching", "mixtures along the frontier, then swaps")
        spent = time.perf_counter() - begin
        schemes, frontier = Search(problem, kl, library, progress).run(SCHEMES, spent)
    return Found(modifiers=modifiers(groups, schemes), frontier=frontier)


def _options(
    sizes: Sequence[Mapping[str, float]], costs: Sequence[Mapping[str, float]]
) -> list[dict[str, Option]]:
    return [
        {scheme: Option(scheme, float(size), cost[scheme]) for scheme, size in one.items()}
        for one, cost in zip(sizes, costs, strict=True)
    ]


def _budget(recipe: Recipe, nbytes: Sequence[Mapping[str, int]], weights: int) -> float:
    """In bytes. Raises ``CompressError`` where it is out of reach."""
    assert recipe.auto is not None
    limit = recipe.auto.limit
    budget = limit * weights / 8 if recipe.auto.budget == "bits" else limit
    low = sum(min(one.values()) for one in nbytes)
    high = sum(one[ORIGINAL] for one in nbytes)
    if low <= budget < high:
        return budget
    if recipe.auto.budget == "bits":
        ends = f"{8 * low / weights:.3f} to {8 * high / weights:.3f} bits"
    else:
        ends = f"{low} to {high} bytes"
    what = "below the smallest schemes" if budget < low else "no less than the original"
    raise CompressError(
        f"auto.{recipe.auto.budget} of {limit:g} is {what}: this model can have {ends}"
    )


def _samples(recipe: Recipe, plan: Plan, checkpoint: Checkpoint, progress: Progress) -> Tensor:
    """Calibration windows, and then those that judge, which are others."""
    calibration = recipe.calibration
    assert calibration is not None
    length = min(calibration.length, plan.spec.context_length)
    size = {"samples": calibration.samples + SELECTION, "length": length}
    if calibration.source == "file":
        paths = [Path(path) for path in calibration.paths]
        return read_samples(checkpoint.folder, paths, **size, seed=recipe.seed)
    progress.phase("generating", f"{size['samples']} x {length} tokens")
    return generate(checkpoint.folder, **size, seed=recipe.seed, int8_weights=True)
