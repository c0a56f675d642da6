"""From an evaluation and limits to a verdict, with a sentence for people. No tensors."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from compress.gate.config import FEWEST_DOCUMENTS, Gate
from compress.gate.decision import Decision, Outcome, decide, near_chance, worst
from compress.measure.figures import GENERATED, Estimate, Evaluation, TaskResult
from compress.measure.paired import drop_estimate

Kind = Literal["kl", "task"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One figure against its limit. ``outcome`` None: reported, not gated, as ``note`` says.

    ``name`` is that of a task. ``value``, ``low`` and ``high`` (95 %) are in ``unit``; larger is
    worse.
    """

    kind: Kind
    name: str
    unit: str
    value: float
    low: float
    high: float
    limit: float
    items: int
    outcome: Outcome | None
    minimum_detectable_effect: float
    items_to_decide: int | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """``sentence`` says what was found, ``remedy`` what can be done where it is no pass."""

    outcome: Outcome
    sentence: str
    remedy: str
    checks: tuple[Check, ...]

    @property
    def kl(self) -> Check | None:
        """None where logits are no numbers."""
        return next((check for check in self.checks if check.kind == "kl"), None)

    @property
    def wants_restoring(self) -> bool:
        """Whether layers are to blame: more questions, not more bits, decide a task."""
        undecided = self.kl is not None and self.kl.outcome is Outcome.INCONCLUSIVE
        return self.outcome is Outcome.FAIL or undecided


def judge(evaluation: Evaluation, gate: Gate) -> Verdict:
    """The worst of all checks decides."""
    if evaluation.kl is None:
        return _broken(evaluation)
    checks = [_check_kl(evaluation.kl, gate.max_kl)]
    checks += [_check_task(task, gate.max_drop) for task in evaluation.tasks]
    outcome = worst([check.outcome for check in checks if check.outcome is not None])
    sentences = [_sentence(check) for check in checks if check.outcome is outcome]
    return Verdict(
        outcome=outcome,
        sentence="; ".join([*sentences, *_speed(evaluation)]),
        remedy=_remedy(outcome, checks, evaluation),
        checks=tuple(checks),
    )


def not_achievable(verdict: Verdict) -> Verdict:
    """Of a recipe that was not good enough with half of its weights restored."""
    if verdict.outcome is Outcome.PASS:
        return verdict
    return replace(
        verdict,
        outcome=Outcome.FAIL,
        sentence=(
            "the recipe is not achievable: it does not pass even with half of its weights "
            f"restored; {verdict.sentence}"
        ),
        remedy="take a recipe with more bits, or raise gate.max_kl or gate.max_drop",
    )


def _broken(evaluation: Evaluation) -> Verdict:
    return Verdict(
        outcome=Outcome.FAIL,
        sentence=(
            "the compressed model gives NaN or infinite logits on "
            f"{evaluation.broken} of {evaluation.documents} documents"
        ),
        remedy="compress again, or with another recipe",
        checks=(),
    )


def _check_kl(estimate: Estimate, limit: float) -> Check:
    decision = decide(estimate, limit)
    if estimate.items < FEWEST_DOCUMENTS:  # their interval means nothing
        effect = decision.minimum_detectable_effect
        decision = Decision(Outcome.INCONCLUSIVE, effect, FEWEST_DOCUMENTS)
    return _check("kl", "kl", "nats per token", estimate, limit, decision)


def _check_task(task: TaskResult, limit: float) -> Check:
    estimate = drop_estimate(task.lost, task.gained, task.items)
    decision = decide(estimate, limit)
    check = _check("task", task.name, "share of answers", estimate, limit, decision)
    if not near_chance(task.original_accuracy, task.chance, task.items):
        return check
    note = (
        f"not gated: the original is right in {100 * task.original_accuracy:.1f} %, "
        f"which guessing ({100 * task.chance:.1f} %) may explain"
    )
    return replace(check, outcome=None, items_to_decide=None, note=note)


def _check(
    kind: Kind, name: str, unit: str, estimate: Estimate, limit: float, decision: Decision
) -> Check:
    return Check(
        kind=kind, name=name, unit=unit, value=estimate.value, low=estimate.low, high=estimate.high,
        limit=limit, items=estimate.items, outcome=decision.outcome,
        minimum_detectable_effect=decision.minimum_detectable_effect,
        items_to_decide=decision.items_to_decide,
    )  # fmt: skip


def _sentence(check: Check) -> str:
    found = f"{_figure(check, check.value)} (95 %: {_figure(check, check.low)} to "
    found += f"{_figure(check, check.high)})"
    what = "KL to the original" if check.kind == "kl" else f"the accuracy lost on {check.name}"
    limit = f"{check.limit:g}" if check.kind == "kl" else f"{100 * check.limit:g} %"
    unit = " nats per token" if check.kind == "kl" else ""
    match check.outcome:
        case Outcome.PASS:
            return f"{what} is {found}{unit}, within the limit of {limit}"
        case Outcome.FAIL:
            return f"{what} is {found}{unit}, above the limit of {limit}"
        case _:
            return f"{what} is {found}{unit}: it may be above the limit of {limit} or not"


def _figure(check: Check, value: float) -> str:
    if check.kind != "kl":
        return f"{100 * value:.2f} %"
    digits = max(2, 2 - math.floor(math.log10(abs(value)))) if value else 2
    return f"{max(0.0, value):.{min(digits, 6)}f}"


def _speed(evaluation: Evaluation) -> list[str]:
    """A flag: it is no reason to refuse, for memory may be what is wanted."""
    if not evaluation.slower:
        return []
    best = max(one.ratio for one in evaluation.speed)
    return [f"it generates slower than the original at every batch size (x {best:.2f} at best)"]


def _remedy(outcome: Outcome, checks: list[Check], evaluation: Evaluation) -> str:
    if outcome is Outcome.PASS:
        return ""
    if outcome is Outcome.FAIL:
        kl_failed = any(check.kind == "kl" and check.outcome is outcome for check in checks)
        limit = "gate.max_kl" if kl_failed else "gate.max_drop"
        return f"take a recipe with more bits, set gate.restore, or raise {limit}"
    wanted = [check for check in checks if check.outcome is outcome]
    return "; ".join(_more(check, evaluation) for check in wanted)


def _more(check: Check, evaluation: Evaluation) -> str:
    what = "documents" if check.kind == "kl" else f"questions of {check.name}"
    if check.items_to_decide is None:
        return f"no practical number of {what} decides: change the limit"
    needed = f"about {check.items_to_decide} {what} would decide (there were {check.items})"
    if check.kind == "kl" and evaluation.data == (GENERATED,):
        return f"{needed}: set gate.documents in the recipe, or --documents of venturi evaluate"
    return needed
