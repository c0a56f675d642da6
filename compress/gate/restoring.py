"""Which decoder layers get their precision back, and what recipe says so. No tensors.

One step up the ladder: pruned weights become whole, 4 bits become 8, 8 bits become the original.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from compress.recipe import Modifier, Recipe
from compress.treatment import Treatment

# Less than this share of the weights in the scheme asked for is another recipe.
LEAST_KEPT = 0.5
_UP = {"w4a8": "w8a8", "w4a16": "w8a16"}


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer: its targeted modules, their weights, and what it costs alone in nats."""

    name: str
    modules: tuple[str, ...]
    weights: int
    contribution: float


def attempts(
    layers: Sequence[Layer], tolerable: float, most_steps: int
) -> Iterator[dict[str, int]]:
    """Ever more restoration, as steps by module, worst layers first.

    The first attempt leaves ``tolerable``, a share of the sum of contributions; each next one
    restores twice as many layers, and then by one step more, until no more may be restored.
    """
    ordered = sorted(layers, key=lambda layer: layer.contribution, reverse=True)
    most = _most(ordered)
    count = _enough([one.contribution for one in ordered], tolerable)
    for steps in range(1, most_steps + 1):
        while count < most:
            yield {module: steps for one in ordered[:count] for module in one.modules}
            count *= 2
        if most:
            yield {module: steps for one in ordered[:most] for module in one.modules}


def kept_share(layers: Sequence[Layer], restored: Mapping[str, int]) -> float:
    """Of the targeted weights."""
    kept = sum(one.weights for one in layers if not set(one.modules) & restored.keys())
    return kept / max(1, sum(one.weights for one in layers))


def ladder(treatment: Treatment) -> tuple[str, ...]:
    """What a module is now, and after each step."""
    found = []
    if treatment.pruner is not None:
        found.append(f"sparse {treatment.bits or 16} bit")
    if treatment.quantiser is not None:
        found.append(f"{treatment.bits} bit")
        if _raised(treatment) is not None:
            found.append("8 bit")
    return (*found, "original")


def restored_recipe(
    recipe: Recipe, treatments: Mapping[str, Treatment], steps: Mapping[str, int]
) -> Recipe:
    """``recipe`` with each module of ``steps`` so many steps up its ladder.

    A modifier that is left without a module goes, since a recipe's modifiers must match some.
    """
    ignored: dict[Modifier, list[str]] = {}
    added: dict[Modifier, list[str]] = {}
    for module, count in sorted(steps.items()):
        treatment = treatments[module]
        left = count
        if treatment.pruner is not None and left > 0:
            ignored.setdefault(treatment.pruner, []).append(module)
            left -= 1
        if treatment.quantiser is not None and left > 0:
            ignored.setdefault(treatment.quantiser, []).append(module)
            raised = _raised(treatment)
            if left == 1 and raised is not None:
                added.setdefault(raised, []).append(module)
    modifiers = [
        replace(one, ignore=(*one.ignore, *ignored.get(one, ())))
        for one in recipe.modifiers
        if any(
            one in treatment.modifiers and module not in ignored.get(one, ())
            for module, treatment in treatments.items()
        )
    ]
    modifiers += [replace(one, targets=tuple(modules)) for one, modules in added.items()]
    return replace(recipe, modifiers=tuple(modifiers))


def _raised(treatment: Treatment) -> Modifier | None:
    """A quantiser of one precision more; None where that is the original."""
    assert treatment.quantiser is not None
    scheme = _UP.get(treatment.quantiser.scheme or "")
    if scheme is None or treatment.bits != 4:
        return None
    return Modifier(type="rtn", scheme=scheme, scale="mse", targets=())


def _most(ordered: Sequence[Layer]) -> int:
    """How many of the worst layers may be restored."""
    total, gone = sum(one.weights for one in ordered), 0
    for count, one in enumerate(ordered):
        gone += one.weights
        if total - gone < LEAST_KEPT * total:
            return count
    return len(ordered)


def _enough(descending: Sequence[float], tolerable: float) -> int:
    """How many of the costs must go until the rest is finite and tolerable: at least one."""
    total = sum(cost for cost in descending if math.isfinite(cost))
    for count in range(1, len(descending)):
        if sum(descending[count:]) <= tolerable * total:
            return count
    return len(descending)
