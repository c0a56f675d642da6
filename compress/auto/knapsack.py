"""One option for each group, at least cost, within a budget: a multiple-choice knapsack.

No tensors. Sizes are bytes or seconds, costs nats; both add up over groups.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

# Of the cost: what ``choose`` may be above the least.
TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Option:
    """What a group may become."""

    scheme: str
    size: float
    cost: float


@dataclass(frozen=True, slots=True)
class _Upgrade:
    """From one option of a group's hull to the next larger; ``rate`` is cost saved per size."""

    group: int
    option: Option
    size: float
    saved: float

    @property
    def rate(self) -> float:
        return self.saved / self.size


def hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of (size, cost), by rising size and falling cost."""
    found: list[Option] = []
    for one in sorted(options, key=lambda option: (option.size, option.cost)):
        if found and one.cost >= found[-1].cost:
            continue
        while len(found) > 1 and _rate(found[-2], found[-1]) <= _rate(found[-1], one):
            found.pop()
        found.append(one)
    return found


def reach(groups: Sequence[Sequence[Option]]) -> tuple[float, float]:
    """The smallest size, and that beyond which nothing gets better."""
    hulls = [hull(options) for options in groups]
    return sum(one[0].size for one in hulls), sum(one[-1].size for one in hulls)


def walk(groups: Sequence[Sequence[Option]]) -> Iterator[tuple[Option, ...]]:
    """The choices that are best for some exchange rate of cost for size, from the smallest on."""
    current = [hull(options)[0] for options in groups]
    yield tuple(current)
    for upgrade in _upgrades(groups):
        current[upgrade.group] = upgrade.option
        yield tuple(current)


def choose(groups: Sequence[Sequence[Option]], budget: float) -> tuple[Option, ...]:
    """The least cost within ``budget``, or at most ``TOLERANCE`` of it more.

    Group by group, all partial choices that no other one beats and that may still win: what the
    rest costs at least is known from its hulls (Dyer and others, 1995).

    Raises:
        ValueError: not even the smallest options fit.
    """
    best = _greedy(groups, budget)
    most = total(best)[1]
    bounds = [_Bound(groups[first:]) for first in range(1, len(groups) + 1)]
    # (size, cost, (option, what came before)), by rising size and falling cost.
    states: list[tuple[float, float, _Chain]] = [(0.0, 0.0, None)]
    for options, bound in zip(groups, bounds, strict=True):
        grown = [
            (size + one.size, cost + one.cost, (one, chain))
            for size, cost, chain in states
            for one in options
        ]
        states = []
        for size, cost, chain in sorted(grown, key=lambda state: state[:2]):
            if states and cost >= states[-1][1]:
                continue
            if cost + bound.least(budget - size) < most * (1 - TOLERANCE):
                states.append((size, cost, chain))
    return _unrolled(states[-1][2]) if states else best


def total(chosen: Sequence[Option]) -> tuple[float, float]:
    """Size and cost."""
    return sum(one.size for one in chosen), sum(one.cost for one in chosen)


_Chain = tuple[Option, "_Chain"] | None


def _unrolled(chain: _Chain) -> tuple[Option, ...]:
    found: list[Option] = []
    while chain is not None:
        option, chain = chain
        found.append(option)
    return tuple(reversed(found))


def _greedy(groups: Sequence[Sequence[Option]], budget: float) -> tuple[Option, ...]:
    """Upgrades that save most for their size first, those that do not fit left out."""
    current = [hull(options)[0] for options in groups]
    size = total(current)[0]
    if size > budget:
        raise ValueError(f"the smallest options need {size:g}, the budget is {budget:g}")
    stuck: set[int] = set()
    for upgrade in _upgrades(groups):
        if upgrade.group in stuck or size + upgrade.size > budget:
            stuck.add(upgrade.group)
            continue
        size += upgrade.size
        current[upgrade.group] = upgrade.option
    return tuple(current)


class _Bound:
    """The least that groups cost, where options may be mixed: by the size they may take."""

    def __init__(self, groups: Sequence[Sequence[Option]]) -> None:
        start = total([hull(options)[0] for options in groups])
        self._upgrades = list(_upgrades(groups))
        self._sizes = list(accumulate((one.size for one in self._upgrades), initial=start[0]))
        self._costs = list(accumulate((-one.saved for one in self._upgrades), initial=start[1]))

    def least(self, size: float) -> float:
        """Infinite where nothing fits."""
        index = bisect_right(self._sizes, size) - 1
        if index < 0:
            return float("inf")
        if index == len(self._upgrades):
            return self._costs[-1]
        return self._costs[index] - (size - self._sizes[index]) * self._upgrades[index].rate


def _upgrades(groups: Sequence[Sequence[Option]]) -> list[_Upgrade]:
    """Of all hulls, best rate first; a group's own stay in their order, for hulls are convex."""
    found = []
    for group, options in enumerate(groups):
        ordered = hull(options)
        for before, after in pairwise(ordered):
            size, saved = after.size - before.size, before.cost - after.cost
            found.append(_Upgrade(group, after, size, saved))
    return sorted(found, key=lambda upgrade: -upgrade.rate)


def _rate(before: Option, after: Option) -> float:
    """Cost saved for each unit of size."""
    return (before.cost - after.cost) / (after.size - before.size)
