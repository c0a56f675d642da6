"""A search from a model folder and a recipe to modifiers and a frontier."""

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress import estimate, preflight
from compress.auto.candidates import CANDIDATES, ORIGINAL, Group, modifiers, tied_groups, uniform
from compress.auto.config import Auto
from compress.auto.costs import group_seconds, other_seconds, stored_bytes
from compress.auto.final_kl import FinalKl
from compress.auto.knapsack import Option
from compress.auto.library import Library
from compress.auto.resolve import Found
from compress.auto.search import Problem, Search, group_costs
from compress.cache import CACHE_REMEDY
from compress.calibration import read_samples
from compress.errors import CompressError
from compress.estimate import Sizes
from compress.generated import generate, threads
from compress.memory import available_bytes
from compress.plan import Plan, make_plan
from compress.preflight import check_served
from compress.progress import Progress
from compress.recipe import Recipe
from engine.blocks import Blocks
from engine.formats.checkpoint import Checkpoint

# Windows beside those of calibration, on which mixtures are judged.
SELECTION = 16


def search(recipe: Recipe, model_dir: Path, scratch: Path, progress: Progress) -> Found:
    """``scratch`` is an empty folder for roundings, which is the caller's to remove.

    Raises ``CompressError`` or ``ModelLoadError``.
    """
    assert recipe.auto is not None
    begin, checkpoint = time.perf_counter(), Checkpoint.open(model_dir)
    check_served(model_dir)
    torch.set_num_threads(threads(sum(info.nbytes for info in checkpoint.tensors.values())))
    task = _Task.of(recipe, checkpoint)
    _preflight(task, scratch, progress)
    costs = _Costs.of(task, progress)
    progress.phase(
        "searching",
        f"{len(task.groups)} groups of linears, {len(CANDIDATES) + 1} schemes: "
        "all are rounded in each",
    )
    ids_SL = _samples(recipe, task.plan, checkpoint, progress)
    blocks = Blocks.open(checkpoint)
    library = Library(checkpoint, task.plans, task.groups, scratch)
    library.fill(blocks, ids_SL[:-SELECTION], progress)
    kl = FinalKl(blocks, ids_SL[-SELECTION:])
    progress.phase("searching", "what each group costs alone")
    nats = group_costs(kl, library, task.groups, progress)
    problem = Problem(
        auto=recipe.auto,
        groups=task.groups,
        options=_options(costs.sizes, nats),
        nbytes=task.nbytes,
        weights=task.weights,
        budget=costs.budget,
        other=costs.other,
    )
    progress.phase("searching", "mixtures along the frontier, then swaps")
    spent = time.perf_counter() - begin
    schemes, frontier = Search(problem, kl, library, progress).run(CANDIDATES, spent)
    return Found(modifiers=modifiers(task.groups, schemes), frontier=frontier)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """A search's groups; bytes by group and scheme, and weights by group."""

    recipe: Recipe
    auto: Auto
    checkpoint: Checkpoint
    plans: Mapping[str, Plan]
    groups: Sequence[Group]
    nbytes: Sequence[Mapping[str, int]]
    weights: Sequence[int]

    @classmethod
    def of(cls, recipe: Recipe, checkpoint: Checkpoint) -> "_Task":
        assert recipe.auto is not None
        plans = {one: make_plan(uniform(recipe, one), checkpoint) for one in CANDIDATES}
        plan = plans["w8a8"]
        groups = tied_groups(plan)
        return cls(
            recipe=recipe,
            auto=recipe.auto,
            checkpoint=checkpoint,
            plans=plans,
            groups=groups,
            nbytes=stored_bytes(groups, plans, checkpoint),
            weights=[sum(plan.weights[module] for module in group.modules) for group in groups],
        )

    @property
    def plan(self) -> Plan:
        """In which all rows have the same scheme: 8 bits per channel."""
        return self.plans["w8a8"]


def _preflight(task: _Task, scratch: Path, progress: Progress) -> None:
    """What one scheme needs; all lie on the disk together. Raises ``CompressError``."""
    scheme = next(iter(task.plans))
    plan, recipe = task.plans[scheme], uniform(task.recipe, scheme)
    if task.auto.budget == "tokens_per_second":
        _check_timing(
            estimate.generation_bytes(Sizes.of(plan, recipe, task.checkpoint), task.checkpoint),
            progress,
        )
    lines = preflight.check(plan, recipe, task.checkpoint, scratch, CACHE_REMEDY)
    kept = sum(size for one in task.nbytes for name, size in one.items() if name != ORIGINAL)
    free = shutil.disk_usage(scratch).free
    if free < kept:
        raise CompressError(
            f"{scratch} has {free >> 20} MB free and the roundings of a search take "
            f"{kept >> 20} MB: free some or {CACHE_REMEDY}"
        )
    progress.phase("planning", f"a search; in each of {len(task.plans)} schemes it {lines[-1]}")


def _check_timing(needed: int, progress: Progress) -> None:
    """``needed`` bytes of memory hold the model that is timed. Raises ``CompressError``."""
    free = available_bytes()
    if free is not None and needed > free:
        raise CompressError(
            f"auto.tokens_per_second: the whole model is timed with int8 weights, which needs "
            f"about {needed >> 20} MB of memory, and {free >> 20} MB are free: free some, or ask "
            "for bits or bytes"
        )
    progress.phase("planning", f"timing the whole model needs about {needed >> 20} MB of memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Costs:
    """``sizes``, by group and scheme, and ``budget`` are bytes, or seconds beside ``other``."""

    sizes: Sequence[Mapping[str, float]]
    budget: float
    other: float | None

    @classmethod
    def of(cls, task: _Task, progress: Progress) -> "_Costs":
        """Raises ``CompressError`` where the budget is out of reach."""
        auto, weights = task.auto, sum(task.weights)
        sizes: Sequence[Mapping[str, float]] = task.nbytes
        other, budget = None, auto.limit
        if auto.budget == "bits":
            budget = auto.limit * weights / 8
        if auto.budget == "tokens_per_second":
            progress.phase("searching", "each matrix in each scheme is timed")
            # A layer with a dense matrix is no single native call: its time is no sum.
            rounded = [[scheme for scheme in one if scheme != ORIGINAL] for one in task.nbytes]
            sizes = group_seconds(task.groups, task.plan, task.checkpoint, rounded)
            other = other_seconds(task.checkpoint.folder, sizes)
            budget = 1 / auto.limit - other
        _check(auto, sizes, budget, weights, other)
        return cls(sizes=sizes, budget=budget, other=other)


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
