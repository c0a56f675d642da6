"""Chooses a scheme for each group: Hessian proxy, KL of the final logits, swaps.

1. Each group is rounded in every scheme, which gives bytes and tr(D H D^T).
2. The KL of the final logits with one group alone in its worst scheme turns that group's
   proxy into nats; the cost of a mixture is taken to be the sum.
3. The frontier is walked, and the KL of mixtures along it measured.
4. From the best mixture within the budget, swaps of schemes between groups are tried, those that
   promise most first, and kept where the KL falls by more than its standard error.
"""

import heapq
import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from compress.auto.candidates import Group
from compress.auto.config import Auto, Frontier, Point
from compress.auto.final_kl import Changed, FinalKl
from compress.auto.knapsack import Option, choose, reach, total, walk
from compress.auto.library import Library
from compress.errors import CompressError
from compress.progress import Progress

# Mixtures along the frontier whose KL is measured.
_STEPS = 8
# Points of the predicted curve at most, but for its end.
_CURVE = 64
# A point's name that is no uniform scheme's.
_MIXTURE = "auto"

Schemes = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """``options[group]`` by scheme. Their sizes are what the budget counts: bytes, or seconds, to
    which a step adds ``other`` seconds (None: bytes).
    """

    auto: Auto
    groups: Sequence[Group]
    options: Sequence[Mapping[str, Option]]
    nbytes: Sequence[Mapping[str, int]]
    weights: Sequence[int]
    budget: float
    other: float | None = None

    def lists(self) -> list[list[Option]]:
        """Options of each group."""
        return [list(one.values()) for one in self.options]

    def bits(self, schemes: Schemes) -> float:
        """Stored bits for each weight."""
        return 8 * self.stored(schemes) / sum(self.weights)

    def stored(self, schemes: Schemes) -> int:
        """Bytes."""
        return sum(sizes[scheme] for sizes, scheme in zip(self.nbytes, schemes, strict=True))

    def totals(self, schemes: Schemes) -> tuple[float, float]:
        """Size and predicted KL."""
        return total([one[scheme] for one, scheme in zip(self.options, schemes, strict=True)])


def group_costs(
    kl: FinalKl, library: Library, groups: Sequence[Group], progress: Progress
) -> list[dict[str, float]]:
    """Nats for each group and scheme: measured in the worst, by the proxy in others."""
    hidden_SLK, found = kl.embedded(), []
    begin, layer = time.perf_counter(), 0
    for done, (group, errors) in enumerate(zip(groups, library.errors, strict=True)):
        if group.layer > layer:
            hidden_SLK = kl.run(hidden_SLK, layer, lambda index: {}, group.layer)
            layer = group.layer
        worst = max(errors, key=lambda scheme: errors[scheme])
        alone = library.changed(layer, dict.fromkeys(group.modules, worst))
        nats = float(kl.of(kl.run(hidden_SLK, layer, _only(layer, alone))).mean())
        if not math.isfinite(nats):
            raise CompressError(f"{group.name} in {worst} gives no numbers: name it in auto.ignore")
        scale = max(0.0, nats) / max(errors[worst], 1e-300)
        found.append({scheme: scale * error for scheme, error in errors.items()})
        each = (time.perf_counter() - begin) / (done + 1)
        progress.layer(done + 1, len(groups), group.name, each * (len(groups) - done - 1))
    return found


class Search:
    """Measures mixtures, each once."""

    def __init__(self, problem: Problem, kl: FinalKl, library: Library, progress: Progress) -> None:
        self._problem = problem
        self._kl = kl
        self._library = library
        self._progress = progress
        self._begin = time.perf_counter()
        self._known: dict[Schemes, Tensor] = {}

    def run(self, named: Iterable[str], spent: float) -> tuple[Schemes, Frontier]:
        """``named``: schemes that are measured for all groups too, where all groups can have them;
        ``spent`` seconds count already. Mixtures without a finite KL are left out.

        Raises:
            CompressError: the mixture that swaps would start from has none.
        """
        problem = self._problem
        start = _schemes(choose(problem.lists(), problem.budget))
        rows = [(_MIXTURE, schemes) for schemes in dict.fromkeys([*self._steps(), start])]
        for scheme in named:
            if all(scheme in one for one in problem.options):
                rows.append((f"uniform {scheme}", (scheme,) * len(problem.groups)))
        for done, (_, schemes) in enumerate(rows):
            begin = time.perf_counter()
            self._of(schemes)
            left = (time.perf_counter() - begin) * (len(rows) - done - 1)
            self._progress.layer(done + 1, len(rows), "the frontier", left)
        if not self._is_finite(start):
            raise CompressError(
                "the mixture of least predicted cost gives no numbers: raise the budget, or name "
                "layers in auto.ignore"
            )
        best, stopped = self._swap(start, spent)
        rows = [row for row in rows if row != (_MIXTURE, best) and self._is_finite(row[1])]
        points = [self._point(name, schemes, chosen=False) for name, schemes in rows]
        points.append(self._point(_MIXTURE, best, chosen=True))
        return best, Frontier(
            points=tuple(sorted(points, key=lambda point: (point.bits, point.name))),
            curve=self._curve(),
            tokens=self._kl.tokens,
            measured=len(self._known),
            stopped=stopped,
        )

    def _steps(self) -> Iterator[Schemes]:
        """Mixtures on the hull, evenly by size, from the smallest to as far beyond the budget."""
        every = [_schemes(one) for one in walk(self._problem.lists())]
        low, high = reach(self._problem.lists())
        span = min(high - low, max(2 * (self._problem.budget - low), (high - low) / 4))
        sizes = [self._problem.totals(one)[0] for one in every]
        for step in range(_STEPS):
            wanted = low + span * step / (_STEPS - 1)
            nearest = min(range(len(every)), key=lambda i: abs(sizes[i] - wanted))
            yield every[nearest]

    def _swap(self, best: Schemes, spent: float) -> tuple[Schemes, str]:
        """Tries the most promising swap that was not tried yet, until enough were."""
        problem, tried = self._problem, {best}
        for count in range(problem.auto.swaps):
            elapsed = spent + time.perf_counter() - self._begin
            if elapsed > problem.auto.time_budget:
                return best, f"time_budget, {count} swaps tried"
            candidate = _most_promising(problem, best, tried)
            if candidate is None:
                return best, f"no swap left, {count} tried"
            tried.add(candidate)
            if _better(self._of(candidate), self._of(best)) and self._is_finite(candidate):
                best = candidate
            each = (time.perf_counter() - self._begin) / len(self._known)
            left = min(each * (problem.auto.swaps - count - 1), problem.auto.time_budget - elapsed)
            self._progress.layer(count + 1, problem.auto.swaps, "swaps", max(0.0, left))
        return best, f"swaps, {problem.auto.swaps} tried"

    def _is_finite(self, schemes: Schemes) -> bool:
        return math.isfinite(float(self._of(schemes).mean()))

    def _of(self, schemes: Schemes) -> Tensor:
        if schemes not in self._known:
            by_layer: dict[int, dict[str, str]] = {}
            for group, scheme in zip(self._problem.groups, schemes, strict=True):
                by_layer.setdefault(group.layer, {}).update(dict.fromkeys(group.modules, scheme))
            self._known[schemes] = self._kl.whole(
                lambda index: self._library.changed(index, by_layer.get(index, {}))
            )
        return self._known[schemes]

    def _point(self, name: str, schemes: Schemes, *, chosen: bool) -> Point:
        problem, shares = self._problem, dict[str, float]()
        for scheme, weights in zip(schemes, problem.weights, strict=True):
            shares[scheme] = shares.get(scheme, 0.0) + weights / sum(problem.weights)
        size, predicted = problem.totals(schemes)
        speed = None if problem.other is None else round(1 / (problem.other + size), 2)
        return Point(
            name=name,
            bits=round(problem.bits(schemes), 4),
            nbytes=problem.stored(schemes),
            predicted_kl=_digits(predicted),
            kl=_digits(float(self._known[schemes].mean())),
            tokens_per_second=speed,
            schemes=tuple((scheme, round(share, 4)) for scheme, share in shares.items()),
            chosen=chosen,
            uniform=name != _MIXTURE,
        )

    def _curve(self) -> tuple[tuple[float, float], ...]:
        """The hull's mixtures, every so many of them."""
        path = [_schemes(one) for one in walk(self._problem.lists())]
        kept = [*path[:: -(-len(path) // _CURVE)], path[-1]]
        every = {
            (round(self._problem.bits(one), 4), _digits(self._problem.totals(one)[1]))
            for one in kept
        }
        return tuple(sorted(every))


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


def _better(candidate_S: Tensor, best_S: Tensor) -> bool:
    """Whether the mean falls by more than the standard error of its paired difference."""
    difference_S = candidate_S - best_S
    error = float(difference_S.std()) / math.sqrt(len(difference_S))
    return float(difference_S.mean()) < -error


# Groups and what they become, and the cost that this adds.
_Move = tuple[float, tuple[tuple[int, str], ...]]


def _most_promising(
    problem: Problem, schemes: Schemes, tried: Collection[Schemes]
) -> Schemes | None:
    """Of the mixtures a move away, the one that is predicted best and not in ``tried``."""
    # Moves give different mixtures, so one of these was not tried unless all were.
    moves = _moves(problem, schemes, len(tried) + 1)
    for _, changed in heapq.nsmallest(len(tried) + 1, moves, key=lambda move: move[0]):
        if (found := _with(schemes, dict(changed))) not in tried:
            return found
    return None


def _moves(problem: Problem, schemes: Schemes, most: int) -> Iterator[_Move]:
    """One group changed, or two, within the budget, where one of them gets better.

    For each change that makes one better, the ``most`` cheapest others beside it.
    """
    room = problem.budget - problem.totals(schemes)[0]
    changes = sorted(
        (
            (option.cost - problem.options[i][now].cost,
             option.size - problem.options[i][now].size, i, option.scheme)
            for i, now in enumerate(schemes)
            for option in problem.options[i].values()
            if option.scheme != now
        ),
    )  # fmt: skip
    for cost, size, i, scheme in changes:
        if cost >= 0:
            return
        if size <= room:
            yield cost, ((i, scheme),)
        beside = (
            (cost + other, ((i, scheme), (j, one)))
            for other, grown, j, one in changes
            # Where both get better, the pair comes up twice.
            if j != i and size + grown <= room and (other >= 0 or i < j)
        )
        yield from islice(beside, most)


def _with(schemes: Schemes, changed: Mapping[int, str]) -> Schemes:
    return tuple(changed.get(i, scheme) for i, scheme in enumerate(schemes))


def _schemes(chosen: Iterable[Option]) -> Schemes:
    return tuple(option.scheme for option in chosen)


def _only(layer: int, tensors: Mapping[str, Tensor]) -> Changed:
    return lambda index: tensors if index == layer else {}
