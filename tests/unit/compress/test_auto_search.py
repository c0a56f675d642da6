"""The walk and the swaps on scripted models, and the measured part of a speed budget."""

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from compress.auto.candidates import Group
from compress.auto.config import Auto
from compress.auto.costs import other_seconds
from compress.auto.final_kl import FinalKl
from compress.auto.knapsack import Option
from compress.auto.library import Library
from compress.auto.search import Problem, Search
from compress.errors import CompressError
from compress.progress import NoProgress

# Size and predicted nats of each group.
OPTIONS = {"low": (1.0, 9.0), "middle": (2.0, 3.0), "high": (4.0, 1.0)}
GROUPS = [Group(layer, "o", (f"layer.{layer}",)) for layer in range(4)]


class ScriptedLibrary:
    """Gives the schemes themselves for tensors."""

    def changed(self, index: int, schemes: Mapping[str, str]) -> dict[str, str]:
        return dict(schemes)


class ScriptedKl:
    """``nats`` of a mixture, the same in all documents."""

    tokens = 6

    def __init__(self, nats: Callable[[tuple[str, ...]], float]) -> None:
        self._nats = nats
        self.asked: list[tuple[str, ...]] = []

    def whole(self, changed: Callable[[int], Mapping[str, str]]) -> Tensor:
        schemes = tuple(changed(g.layer)[g.modules[0]] for g in GROUPS)
        self.asked.append(schemes)
        return torch.full((3,), self._nats(schemes), dtype=torch.float64)


def predicted(schemes: tuple[str, ...]) -> float:
    return sum(OPTIONS[scheme][1] * (1 + i / 10) for i, scheme in enumerate(schemes))


def searched(kl: ScriptedKl, budget: float, swaps: int) -> tuple[tuple[str, ...], Any]:
    options = [
        {name: Option(name, size, cost * (1 + i / 10)) for name, (size, cost) in OPTIONS.items()}
        for i in range(len(GROUPS))
    ]
    problem = Problem(
        auto=Auto(budget="bytes", limit=budget, swaps=swaps),
        groups=GROUPS,
        options=options,
        nbytes=[{name: int(size) for name, (size, _) in OPTIONS.items()} for _ in GROUPS],
        weights=[4] * len(GROUPS),
        budget=budget,
    )
    search = Search(problem, cast(FinalKl, kl), cast(Library, ScriptedLibrary()), NoProgress())
    return search.run(["low"], 0.0)


def test_swaps_are_the_most_promising_first() -> None:
    walked, kl = ScriptedKl(predicted), ScriptedKl(predicted)
    searched(walked, 10.0, 0)
    best, frontier = searched(kl, 10.0, 1000)
    within = [
        one
        for one in itertools.product(OPTIONS, repeat=len(GROUPS))
        if sum(OPTIONS[scheme][0] for scheme in one) <= 10
    ]
    assert predicted(best) == pytest.approx(min(map(predicted, within)))
    # One group differs, or two, and one gets better.
    near = {
        one
        for one in within
        if 1 <= sum(map(str.__ne__, one, best)) <= 2
        and any(OPTIONS[new][1] < OPTIONS[old][1] for new, old in zip(one, best, strict=True))
    }
    swaps = kl.asked[len(walked.asked) :]
    assert set(swaps) == near - set(walked.asked)
    assert [predicted(one) for one in swaps] == sorted(map(predicted, swaps))
    assert len(kl.asked) == len(set(kl.asked)) == frontier.measured
    assert frontier.stopped == f"no swap left, {len(near)} tried"


def test_uniform_points_are_marked() -> None:
    _, frontier = searched(ScriptedKl(predicted), 10.0, 0)
    assert {(one.name, one.uniform) for one in frontier.points} == {
        ("auto", False),
        ("uniform low", True),
    }


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_mixtures_without_numbers_are_not_chosen(value: float) -> None:
    start, _ = searched(ScriptedKl(predicted), 10.0, 0)
    broken = lambda schemes: predicted(schemes) if schemes == start else value  # noqa: E731
    best, frontier = searched(ScriptedKl(broken), 10.0, 3)
    assert best == start
    assert [one.chosen for one in frontier.points] == [True]
    with pytest.raises(CompressError, match=r"gives no numbers: raise the budget, or .*ignore"):
        searched(ScriptedKl(lambda schemes: value), 10.0, 3)


@pytest.mark.parametrize(("whole", "other"), [(0.010, 0.007), (0.003, 0.0), (0.002, 0.0)])
def test_what_a_step_takes_besides_matrices(
    monkeypatch: pytest.MonkeyPatch, whole: float, other: float
) -> None:
    monkeypatch.setattr("compress.auto.costs.decoding_seconds", lambda folder: whole)
    found = other_seconds(Path(), [{"w8a8": 0.001, "low": 0.5}, {"w8a8": 0.002}])
    assert found == pytest.approx(other, abs=1e-12)
    assert found >= 0
