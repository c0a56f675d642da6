"""Non-inferiority: an interval and a limit become pass, fail or inconclusive. No tensors.

An artefact passes where the upper end of the 95 % interval of its loss is at most the limit: it is
shown to be good enough, not merely not shown to be bad. With two-sided intervals an artefact at
the limit passes in 2.5 % of the cases, and 5 % allow for what intervals of few items miss.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

from compress.measure.figures import LEVEL, Estimate

POWER = 0.8


class Outcome(StrEnum):
    """Worst last."""

    PASS = "pass"
    INCONCLUSIVE = "inconclusive"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Decision:
    """``minimum_detectable_effect``: how far from the limit a true value must lie to be judged
    so with 80 % power by these items. ``items_to_decide`` would judge the value found, with the
    same power; None where it is judged, or lies at the limit.
    """

    outcome: Outcome
    minimum_detectable_effect: float
    items_to_decide: int | None


def decide(estimate: Estimate, limit: float) -> Decision:
    """Judges a loss of at most ``limit``; figures that are not finite fail."""
    if not all(map(math.isfinite, (estimate.value, estimate.low, estimate.high))):
        return Decision(Outcome.FAIL, math.inf, None)
    effect = minimum_detectable_effect(estimate)
    if estimate.high <= limit:
        return Decision(Outcome.PASS, effect, None)
    if estimate.low > limit:
        return Decision(Outcome.FAIL, effect, None)
    return Decision(Outcome.INCONCLUSIVE, effect, _items_to_decide(estimate, limit, effect))


def minimum_detectable_effect(estimate: Estimate) -> float:
    """Level and power together, in standard errors of the estimate."""
    freedom = max(1, estimate.items - 1)
    sigmas = student_quantile(LEVEL, freedom) + student_quantile(POWER, freedom)
    return sigmas * estimate.standard_error


def worst(outcomes: list[Outcome]) -> Outcome:
    """Of all checks; no check passes nothing, so that an empty gate is inconclusive."""
    order = list(Outcome)
    return max(outcomes, key=order.index, default=Outcome.INCONCLUSIVE)


def near_chance(accuracy: float, chance: float, items: int) -> bool:
    """Whether an accuracy lies within 3 standard errors of guessing: nothing can be lost there."""
    return abs(accuracy - chance) < 3 * math.sqrt(chance * (1 - chance) / items)


def student_quantile(probability: float, freedom: int) -> float:
    """Of Student's t with ``freedom`` degrees, by the Cornish-Fisher expansion.

    Within 1 % for probabilities up to 0.975 and 5 degrees of freedom and more.
    """
    z = NormalDist().inv_cdf(probability)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def _items_to_decide(estimate: Estimate, limit: float, effect: float) -> int | None:
    gap = abs(limit - estimate.value)
    if gap <= 1e-3 * effect:  # a million times the items: no number that anybody would use
        return None
    return max(estimate.items + 1, math.ceil(estimate.items * (effect / gap) ** 2))
