"""Compress, judge, and where it is not good enough give the worst layers back and judge again.

Restoring looks at the selection half of text and questions; the verdict is made on the other
half, which is looked at once.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec

from compress.cache import CACHE_REMEDY, Built
from compress.errors import writing
from compress.files import write_whole
from compress.gate.judging import CONFIRMATION, SELECTION, Judge, Measured
from compress.gate.report import Report, Restored
from compress.gate.restoring import Layer, attempts, kept_share, ladder, restored_recipe
from compress.recipe import Recipe

# Makes, or finds, the artefact of a recipe.
Build = Callable[[Recipe], Built]


@dataclass(frozen=True, slots=True, kw_only=True)
class Restoration:
    """What came of restoring; ``recipe`` is the one asked for where nothing helped.

    ``exhausted``: recipes that keep more were tried, and none was good enough.
    """

    recipe: Recipe
    exhausted: bool
    restored: tuple[Restored, ...] = ()
    kept_share: float = 1.0


def compress_and_judge(recipe: Recipe, build: Build, judge: Judge) -> tuple[Built, Report]:
    """What is to be served, and why or why not.

    Raises ``CompressError`` or ``ModelLoadError``: a model or data is not as needed.
    """
    judge.check_data()
    built = build(recipe)
    if not judge.gate.restore:
        return built, judge.report(built.artefact)
    first = judge.measure(built.artefact, SELECTION)
    if not first.verdict.wants_restoring:
        return built, judge.report(built.artefact, CONFIRMATION)
    restoration = _remembered(recipe, build, judge, built.artefact, first)
    built = build(restoration.recipe)
    report = judge.report(
        built.artefact,
        CONFIRMATION,
        restored=restoration.restored,
        kept_share=restoration.kept_share,
        achievable=not restoration.exhausted,
    )
    return built, report


def _remembered(
    recipe: Recipe, build: Build, judge: Judge, artefact: Path, first: Measured
) -> Restoration:
    """As ``_restore``, or what that found before."""
    text = json.dumps([first.key, recipe.canonical_json(), asdict(judge.gate)])
    folder = judge.cache_dir / "restorations"
    file = folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
    try:
        found = msgspec.convert(json.loads(file.read_text(encoding="utf-8")), Restoration)
        # The same recipe may have had another name.
        return replace(found, recipe=replace(found.recipe, name=recipe.name))
    except (OSError, ValueError, msgspec.ValidationError):
        found = _restore(recipe, build, judge, artefact, first)
    with writing(folder, CACHE_REMEDY):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(asdict(found), allow_nan=False) + "\n")
    return found


def _restore(
    recipe: Recipe, build: Build, judge: Judge, artefact: Path, first: Measured
) -> Restoration:
    """Tries recipes that keep more, until one is good enough on the selection half."""
    from compress.measure.contribution import contributions
    from compress.plan import make_plan
    from engine.formats.checkpoint import Checkpoint

    plan = make_plan(recipe, Checkpoint.open(judge.original))
    costs = contributions(
        judge.original, artefact, judge.text(artefact).half(SELECTION), judge.progress
    )
    layers = []
    for index, (names, cost) in enumerate(zip(plan.spec.names, costs, strict=True)):
        modules = tuple(
            module
            for matrix in names.matrices()
            for module in matrix.modules
            if module in plan.treatments
        )
        weights = sum(plan.weights[module] for module in modules)
        if modules:
            layers.append(Layer(f"layer {index}", modules, weights, cost))
    ladders = {module: ladder(one) for module, one in plan.treatments.items()}
    most_steps = max(len(one) for one in ladders.values()) - 1
    exhausted = False
    for steps in attempts(layers, first.tolerable, most_steps):
        exhausted = True
        restored = [one for one in layers if one.modules[0] in steps]
        names_restored = ", ".join(one.name for one in restored)
        judge.progress.phase("restoring", names_restored)
        candidate = restored_recipe(recipe, plan.treatments, steps)
        measured = judge.measure(build(candidate).artefact, SELECTION)
        if not measured.verdict.wants_restoring:
            return Restoration(
                recipe=candidate,
                exhausted=False,
                restored=tuple(_row(one, ladders, steps) for one in restored),
                kept_share=round(kept_share(layers, steps), 4),
            )
    return Restoration(recipe=recipe, exhausted=exhausted)


def _row(layer: Layer, ladders: dict[str, tuple[str, ...]], steps: dict[str, int]) -> Restored:
    rungs = ladders[layer.modules[0]]
    after = rungs[min(steps[layer.modules[0]], len(rungs) - 1)]
    cost = layer.contribution if math.isfinite(layer.contribution) else None
    return Restored(name=layer.name, before=rungs[0], after=after, contribution=cost)
