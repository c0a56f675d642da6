"""The choice of an option for each group against all choices there are."""

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.auto.knapsack import TOLERANCE, Option, choose, hull, reach, total, walk

OPTION = st.tuples(st.integers(1, 9), st.integers(0, 50))
GROUPS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5).map(
    lambda groups: [
        [Option(f"{i}", float(size), cost / 7) for i, (size, cost) in enumerate(group)]
        for group in groups
    ]
)


@given(groups=GROUPS, slack=st.integers(0, 20))
def test_nothing_within_the_budget_costs_less(groups: list[list[Option]], slack: int) -> None:
    budget = reach(groups)[0] + slack
    chosen = choose(groups, budget)
    assert all(option in group for option, group in zip(chosen, groups, strict=True))
    size, cost = total(chosen)
    assert size <= budget
    least = min(total(one)[1] for one in product(*groups) if total(one)[0] <= budget)
    assert least - 1e-9 <= cost <= least / (1 - TOLERANCE) + 1e-9


@given(groups=GROUPS)
def test_below_the_smallest_nothing_fits(groups: list[list[Option]]) -> None:
    with pytest.raises(ValueError, match="smallest options need"):
        choose(groups, reach(groups)[0] - 0.5)


@given(groups=GROUPS)
def test_the_walk_is_best_for_what_it_takes(groups: list[list[Option]]) -> None:
    path = list(walk(groups))
    assert total(path[0])[0] == reach(groups)[0]
    assert total(path[-1])[0] == reach(groups)[1]
    assert total(path[-1])[1] == pytest.approx(sum(min(o.cost for o in g) for g in groups))
    for before, after in pairwise(path):
        assert total(before)[0] < total(after)[0]
        assert total(before)[1] > total(after)[1]
    every = [total(one) for one in product(*groups)]
    # Each step is a vertex of the convex hull, or lies on its edge between two.
    for one in path:
        size, cost = total(one)
        assert cost <= min(c for s, c in every if s <= size) + 1e-9


@given(options=st.lists(OPTION, min_size=1, max_size=8))
def test_the_hull_is_convex(options: list[tuple[int, int]]) -> None:
    found = hull([Option("", float(size), float(cost)) for size, cost in options])
    rates = [(a.cost - b.cost) / (b.size - a.size) for a, b in pairwise(found)]
    assert all(rate > 0 for rate in rates)
    assert rates == sorted(rates, reverse=True)
    assert found[-1].cost == min(cost for _, cost in options)
    assert found[0].size == min(size for size, _ in options)


def test_many_groups_are_chosen_at_once() -> None:
    groups = [
        [Option("4", 4.0 + i % 3, 1.0 + i % 7), Option("5", 5.5 + i % 5, 0.6), Option("8", 9.0, 0)]
        for i in range(160)
    ]
    low, high = reach(groups)
    chosen = choose(groups, (low + high) / 2)
    assert total(chosen)[0] <= (low + high) / 2
