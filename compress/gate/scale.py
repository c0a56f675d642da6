"""``--scale``: from recipes that lose little to ones that lose more, as far as the gate lets it.

The order is fixed and the first that does not pass ends it. So a recipe above the limit is served
only where the first such one passes by chance, as rarely as with one recipe alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from compress.cache import Built
from compress.errors import CompressError
from compress.gate.flow import Build, compress_and_judge
from compress.gate.judging import Judge
from compress.gate.report import Report
from compress.progress import Progress
from compress.recipe import Recipe, resolve

RUNGS = ("w8a16", "w8a8", "w4a8", "sparse50-w4a8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Climb:
    """The last rung that passed, or the first where none did.

    ``line`` says where it stopped and why.
    """

    recipe: Recipe
    built: Built
    report: Report
    line: str


def climb(build: Build, judge_of: Callable[[Recipe], Judge], progress: Progress) -> Climb:
    """Raises ``CompressError`` or ``ModelLoadError`` where not even the first can be judged."""
    reached: Climb | None = None
    for number, name in enumerate(RUNGS, start=1):
        progress.phase("climbing", f"{name}, rung {number} of {len(RUNGS)}")
        recipe = resolve(name)
        recipe = replace(recipe, gate=replace(recipe.gate, mode="enforce"))
        try:
            built, report = compress_and_judge(recipe, build, judge_of(recipe))
        except CompressError as error:
            if reached is None:
                raise
            return _stopped(reached, f"{recipe.name} cannot be made: {error}")
        if report.refused and reached is not None:
            found = f"{report.verdict.outcome.value}: {report.verdict.sentence}"
            return _stopped(reached, f"{recipe.name} does not pass: {found}")
        line = f"stopped before the first rung, {recipe.name}: {report.line()}"
        if not report.refused:
            line = f"stopped at {recipe.name}, the last rung: {report.line()}"
        reached = Climb(recipe=recipe, built=built, report=report, line=line)
        if report.refused:
            return reached
    assert reached is not None
    return reached


def _stopped(reached: Climb, why: str) -> Climb:
    line = f"stopped at {reached.recipe.name} ({reached.report.line()}), since {why}"
    return replace(reached, line=line)
