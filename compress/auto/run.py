"""A search from a model folder and a recipe to modifiers and a frontier."""

import math
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress import preflight
from compress.auto.candidates import ORIGINAL, SCHEMES, Group, modifiers, tied_groups, uniform
from compress.auto.config import Auto
from compress.auto.costs import group_seconds, other_seconds, stored_bytes
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
from compress.preflight import check_served
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
    check_served(model_dir)
    torch.set_num_threads(threads(sum(info.nbytes for info in checkpoint.tensors.values())))
    plans = {scheme: make_plan(uniform(recipe, scheme), checkpoint) for scheme in SCHEMES}
    plan = plans["w8a8"]
    groups = tied_groups(plan)
    costs = _Costs.of(recipe.auto, groups, plans, checkpoint, progress)
    _preflight(recipe, plans, checkpoint, costs.nbytes, scratch, progress)
    progress.phase(
        "searching",
        f"{len(groups)} groups of linears, {len(SCHEMES) + 1} schemes: all are rounded in each",
    )
    ids_SL = _samples(recipe, plan, checkpoint, progress)
    blocks = Blocks.open(checkpoint)
    with writing(scratch, CACHE_REMEDY), tempfile.TemporaryDirectory(dir=scratch) as folder:
        library = Library(checkpoint, plans, groups, Path(folder))
        library.fill(blocks, ids_SL[:-SELECTION], progress)
        kl = FinalKl(blocks, ids_SL[-SELECTION:])
        progress.phase("searching", "what each group costs alone")
        nats = group_costs(kl, library, groups, progress)
        problem = Problem(
            auto=recipe.auto,
            groups=groups,
            options=_options(costs.sizes, nats),
            nbytes=costs.nbytes,
            weights=costs.weights,
            budget=costs.budget,
            other=costs.other,
        )
        progress.phase("searching", "mixtures along the frontier, then swaps")
        spent = time.perf_counter() - begin
        schemes, frontier = Search(problem, kl, library, progress).run(SCHEMES, spent)
    return Found(modifiers=modifiers(groups, schemes), frontier=frontier)


def _preflight(
    recipe: Recipe,
    plans: Mapping[str, Plan],
    checkpoint: Checkpoint,
    nbytes: Sequence[Mapping[str, int]],
    scratch: Path,
    progress: Progress,
) -> None:
    """What one scheme needs; all lie on the disk together. Raises ``CompressError``."""
    scheme = next(iter(plans))
    plan = plans[scheme]
    lines = preflight.check(plan, uniform(recipe, scheme), checkpoint, scratch, CACHE_REMEDY)
    kept = sum(size for one in nbytes for name, size in one.items() if name != ORIGINAL)
    free = shutil.disk_usage(scratch).free
    if free < kept:
        raise CompressError(
            f"{scratch} has {free >> 20} MB free and the roundings of a search take "
            f"{kept >> 20} MB: free some or {CACHE_REMEDY}"
        )
    progress.phase("planning", f"a search; in each of {len(plans)} schemes it {lines[-1]}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Costs:
    """By group and scheme. ``sizes`` and ``budget`` are bytes, or seconds beside ``other``."""

    nbytes: Sequence[Mapping[str, int]]
    weights: Sequence[int]
    sizes: Sequence[Mapping[str, float]]
    budget: float
    other: float | None

    @classmethod
    def of(
        cls,
        auto: Auto,
        groups: Sequence[Group],
        plans: Mapping[str, Plan],
        checkpoint: Checkpoint,
        progress: Progress,
    ) -> "_Costs":
        """Raises ``CompressError`` where the budget is out of reach."""
        plan = plans["w8a8"]
        nbytes = stored_bytes(groups, plans, checkpoint)
        weights = [sum(plan.weights[module] for module in group.modules) for group in groups]
        sizes: Sequence[Mapping[str, float]] = nbytes
        other, budget = None, auto.limit
        if auto.budget == "bits":
            budget = auto.limit * sum(weights) / 8
        if auto.budget == "tokens_per_second":
            progress.phase("searching", "each matrix in each scheme is timed")
            # A layer with a dense matrix is no single native call: its time is no sum.
            rounded = [[scheme for scheme in one if scheme != ORIGINAL] for one in nbytes]
            sizes = group_seconds(groups, plan, checkpoint, rounded)
            other = other_seconds(checkpoint.folder, sizes)
            budget = 1 / auto.limit - other
        _check(auto, sizes, budget, sum(weights), other)
        return cls(nbytes=nbytes, weights=weights, sizes=sizes, budget=budget, other=other)


def _check(
    auto: Auto,
    sizes: Sequence[Mapping[str, float]],
    budget: float,
    weights: int,
    other: float | None,
) -> None:
    low = sum(min(one.values()) for one in sizes)
    best = ORIGINAL if other is None else "w8a8"
    high = sum(one[best] for one in sizes)
    if low <= budget < high:
        return
    if other is not None and low == high:
        raise CompressError(
            "auto.tokens_per_second: nothing is faster than w8a8 here: ask for bits"
        )
    if other is not None:
        fastest = math.floor(10 / (low + other)) / 10
        reach = f"more than {1 / (high + other):.1f}, at most {fastest:.1f}"
    elif auto.budget == "bits":
        least = math.ceil(8000 * low / weights) / 1000
        reach = f"at least {least:.3f}, less than {8 * high / weights:.3f}"
    else:
        reach = f"at least {low:.0f}, less than {high:.0f}"
    what = "cannot be kept" if budget < low else f"is kept by {best} alone"
    raise CompressError(
        f"auto.{auto.budget} of {auto.limit:g} {what}: for this model, ask for {reach}"
    )


def _options(
    sizes: Sequence[Mapping[str, float]], nats: Sequence[Mapping[str, float]]
) -> list[dict[str, Option]]:
    return [
        {scheme: Option(scheme, float(size), cost[scheme]) for scheme, size in one.items()}
        for one, cost in zip(sizes, nats, strict=True)
    ]


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
