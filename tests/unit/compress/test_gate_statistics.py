"""The gate's statistics: properties, and error rates in simulated evaluations."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from compress.gate.decision import (
    Estimate,
    Outcome,
    decide,
    near_chance,
    student_quantile,
    worst,
)
from compress.measure.intervals import ratio_estimate
from compress.measure.paired import drop_estimate

RUNS = 600
Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]
# Losses of documents with mean 1 and different tails.
DRAWS: dict[str, Draw] = {
    "normal": lambda random, n: random.normal(1, 0.3, n),
    "t": lambda random, n: 1 + 0.3 * random.standard_t(5, n),
    "skewed": lambda random, n: random.lognormal(-0.125, 0.5, n),
}


def pass_share(draw: Draw, documents: int, limit: float) -> float:
    """Share of evaluations of a loss with mean 1 that pass ``limit``."""
    random = np.random.default_rng(documents)
    passed = 0
    for run in range(RUNS):
        sizes = random.integers(64, 129, documents).astype(float)
        estimate = ratio_estimate(draw(random, documents) * sizes, sizes, seed=run)
        passed += decide(estimate, limit).outcome is Outcome.PASS
    return passed / RUNS


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.measure.intervals._RESAMPLES", 800)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("documents", [16, 64])
def test_at_the_limit_at_most_one_in_twenty_passes(draw: str, documents: int) -> None:
    # 600 runs at 5 %: two standard errors are 1.8 %.
    assert pass_share(DRAWS[draw], documents, 1.0) <= 0.05 + 0.018


@pytest.mark.parametrize("documents", [16, 64])
def test_the_stated_effect_is_found_with_the_stated_power(documents: int) -> None:
    unequal_sizes = math.sqrt(1 + (64**2 / 12) / 96**2)
    error = unequal_sizes * 0.3 / math.sqrt(documents)
    effect = decide(Estimate(0, 0, 0, documents, error), 1.0)
    share = pass_share(DRAWS["normal"], documents, 1 + effect.minimum_detectable_effect)
    assert 0.76 <= share <= 0.86


@pytest.mark.parametrize(("items", "changed"), [(400, 0.03), (400, 0.2), (2000, 0.02)])
def test_accuracy_at_the_limit_passes_rarely(items: int, changed: float) -> None:
    """``changed`` is the share of answers that differ, with a true drop at the limit."""
    random, limit = np.random.default_rng(0), 0.02
    lost, gained = (changed + limit) / 2, (changed - limit) / 2
    draws = random.multinomial(items, [lost, gained, 1 - changed], size=2000)
    tables, counts = np.unique(draws[:, :2], axis=0, return_counts=True)
    passed = sum(
        int(count)
        for (b, c), count in zip(tables, counts, strict=True)
        if decide(drop_estimate(int(b), int(c), items), limit).outcome is Outcome.PASS
    )
    assert passed / 2000 <= 0.05


def test_accuracy_has_the_stated_power() -> None:
    random, items, changed = np.random.default_rng(1), 1500, 0.1
    half = round(items * changed / 2)
    effect = decide(drop_estimate(half, half, items), 0.5).minimum_detectable_effect
    draws = random.multinomial(items, [changed / 2, changed / 2, 1 - changed], size=1000)
    passed = [
        decide(drop_estimate(int(b), int(c), items), effect).outcome is Outcome.PASS
        for b, c, _ in draws
    ]
    assert 0.76 <= sum(passed) / 1000 <= 0.86


def test_an_unchanged_model_needs_items_to_pass() -> None:
    """No answer changed: 380 questions show a drop below 1 %, fewer do not."""
    assert decide(drop_estimate(0, 0, 380), 0.01).outcome is not Outcome.PASS
    assert decide(drop_estimate(0, 0, 381), 0.01).outcome is Outcome.PASS


@given(
    items=st.integers(1, 500),
    lost=st.integers(0, 500),
    gained=st.integers(0, 500),
)
def test_an_interval_of_a_drop_holds_its_value(items: int, lost: int, gained: int) -> None:
    lost = min(lost, items)
    gained = min(gained, items - lost)
    found = drop_estimate(lost, gained, items)
    assert -1 <= found.low <= found.value <= found.high <= 1
    mirrored = drop_estimate(gained, lost, items)
    assert mirrored.low == pytest.approx(-found.high, abs=1e-9)
    more = drop_estimate(4 * lost, 4 * gained, 4 * items)
    assert more.high - more.low < found.high - found.low


@given(
    value=st.floats(-1, 1), half=st.floats(0, 1), limit=st.floats(-1, 1), items=st.integers(2, 999)
)
def test_decisions_are_consistent(value: float, half: float, limit: float, items: int) -> None:
    estimate = Estimate(value, value - half, value + half, items, half / 1.96)
    decision = decide(estimate, limit)
    assert (decision.outcome is Outcome.PASS) == (value + half <= limit)
    assert (decision.outcome is Outcome.FAIL) == (value - half > limit)
    assert (decision.items_to_decide is None) or decision.items_to_decide > items
    if decision.outcome is not Outcome.INCONCLUSIVE:
        assert decision.items_to_decide is None


def test_the_items_asked_for_decide() -> None:
    first = Estimate(0.8, 0.5, 1.1, 30, 0.15)
    needed = decide(first, 1.0).items_to_decide
    assert needed is not None
    error = 0.15 * math.sqrt(30 / needed)
    second = Estimate(0.8, 0.8 - 1.96 * error, 0.8 + 1.96 * error, needed, error)
    assert decide(second, 1.0).outcome is Outcome.PASS
    assert decide(Estimate(1.0, 0.9, 1.1, 30, 0.05), 1.0).items_to_decide is None


def test_what_is_not_finite_fails() -> None:
    estimate = ratio_estimate(np.array([1.0, np.nan, 1.0]), np.ones(3))
    assert math.isnan(estimate.value)
    assert decide(estimate, 1.0).outcome is Outcome.FAIL


def test_constant_documents_have_no_interval() -> None:
    estimate = ratio_estimate(np.full(9, 0.1), np.full(9, 10.0))
    assert (estimate.low, estimate.high) == pytest.approx((0.01, 0.01))


def test_an_interval_covers_more_with_more_documents() -> None:
    random = np.random.default_rng(0)
    draws = random.lognormal(0, 1, 400)
    few, many = (ratio_estimate(draws[:n], np.ones(n)) for n in (20, 400))
    assert many.high - many.low < few.high - few.low
    assert few.low < few.value < few.high
    assert few == ratio_estimate(draws[:20], np.ones(20))


def test_worst() -> None:
    assert worst([Outcome.PASS, Outcome.FAIL, Outcome.INCONCLUSIVE]) is Outcome.FAIL
    assert worst([Outcome.PASS, Outcome.INCONCLUSIVE]) is Outcome.INCONCLUSIVE
    assert worst([Outcome.PASS]) is Outcome.PASS
    assert worst([]) is Outcome.INCONCLUSIVE


def test_student_quantiles() -> None:
    # Tables of Student's t.
    for freedom, wanted in ((5, 2.571), (15, 2.131), (31, 2.040), (1000, 1.962)):
        assert student_quantile(0.975, freedom) == pytest.approx(wanted, rel=0.01)
    assert student_quantile(0.8, 15) == pytest.approx(0.866, rel=0.01)


def test_chance() -> None:
    assert near_chance(0.53, 0.5, 1000)
    assert near_chance(0.40, 0.5, 100)
    assert not near_chance(0.60, 0.5, 1000)
