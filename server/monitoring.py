"""Averages of what the engine's monitor sees, and the alarms: when a figure leaves its limits."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from engine.figures import LayerFigures, StepFigures

logger = logging.getLogger(__name__)

# Averages are over about so many of the last rows; a shift is judged when there are that many.
WINDOW_ROWS = 256
# An entropy alarm ends when the shift is below this share of the limit: it must not flicker.
_CLEAR_SHARE = 0.8
_ADVICE = "see docs/monitoring.md"


class Alarm(StrEnum):
    """What can leave its limits."""

    NON_FINITE = "non_finite"
    ENTROPY = "entropy"


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmLimits:
    """``entropy_nats``: shift of the mean entropy from the reference, up or down. ``non_finite``:
    NaN or infinite numbers since the variant began to be served: rows of logits, values of
    activations, KV scales."""

    entropy_nats: float
    non_finite: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyReference:
    """Of the original on the text that the artefact was evaluated on; nats per token."""

    mean: float


@dataclass(slots=True)
class Average:
    """Of values with weights; what is older counts less."""

    _total: float = 0.0
    _weight: float = 0.0

    @property
    def value(self) -> float | None:
        """None before the first value."""
        return self._total / self._weight if self._weight else None

    def add(self, total: float, weight: float, rows: int) -> None:
        """``total`` of a step, over ``weight``; the step was looked at in ``rows`` rows."""
        kept = (1.0 - 1.0 / WINDOW_ROWS) ** rows
        self._total = kept * self._total + total
        self._weight = kept * self._weight + weight


@dataclass(slots=True)
class LayerWatch:
    """Shares are of values rounded; ``outlier`` is the mean of the steps' largest absmax / rms.

    ``non_finite`` and ``kv_non_finite`` are counts.
    """

    zeroed: Average = field(default_factory=Average)
    saturated: Average = field(default_factory=Average)
    outlier: Average = field(default_factory=Average)
    non_finite: int = 0
    kv_non_finite: int = 0

    def take(self, figures: LayerFigures, rows: int) -> None:
        """Adds a step's."""
        self.zeroed.add(figures.zeroed, figures.rounded, rows)
        self.saturated.add(figures.saturated, figures.rounded, rows)
        self.outlier.add(figures.outlier * rows, rows, rows)
        self.non_finite += figures.non_finite
        self.kv_non_finite += figures.kv_non_finite


class Watch:
    """One served variant. ``on_alarm`` hears of each alarm when it begins, with its line."""

    def __init__(
        self, limits: AlarmLimits, reference: EntropyReference | None, name: str = ""
    ) -> None:
        self._limits = limits
        self._name = name
        self.reference = reference
        self.sampled_steps = 0
        self.non_finite_logits = 0
        self.layers: list[LayerWatch] = []
        self._entropy = Average()
        self._entropy_rows = 0
        self.alarms: dict[Alarm, str] = {}
        self.on_alarm: Callable[[Alarm, str], None] = lambda alarm, line: None

    def __repr__(self) -> str:
        return f"<Watch {self._name} {self.sampled_steps} steps, alarms {list(self.alarms)}>"

    @property
    def entropy(self) -> float | None:
        """Mean entropy of the next token's distribution in nats."""
        return self._entropy.value

    @property
    def entropy_shift(self) -> float | None:
        """From the reference, in nats; None where there is none, or too few rows to judge."""
        if self.entropy is None or self.reference is None or self._entropy_rows < WINDOW_ROWS:
            return None
        return self.entropy - self.reference.mean

    @property
    def non_finite(self) -> int:
        """All that was found."""
        inside = sum(layer.non_finite + layer.kv_non_finite for layer in self.layers)
        return self.non_finite_logits + inside

    def take(self, figures: StepFigures) -> None:
        """Adds a step's, and raises or ends alarms."""
        self.non_finite_logits += figures.non_finite_logits
        if figures.layers:
            self.sampled_steps += 1
            self.layers = self.layers or [LayerWatch() for _ in figures.layers]
            for layer, one in zip(self.layers, figures.layers, strict=True):
                layer.take(one, figures.rows)
        rows = len(figures.entropies)
        self._entropy.add(sum(figures.entropies), rows, rows)
        self._entropy_rows += rows
        self._judge_non_finite()
        self._judge_entropy()

    def _judge_non_finite(self) -> None:
        found = self.non_finite
        if found >= self._limits.non_finite and Alarm.NON_FINITE not in self.alarms:
            inside = f"{found - self.non_finite_logits} in layers"
            self._begin(
                Alarm.NON_FINITE,
                f"{found} times NaN or infinite numbers ({self.non_finite_logits} rows of logits, "
                f"{inside}), and {self._limits.non_finite} are an alarm",
            )

    def _judge_entropy(self) -> None:
        shift, limit = self.entropy_shift, self._limits.entropy_nats
        if shift is None or self.reference is None:
            return
        if Alarm.ENTROPY in self.alarms:
            if abs(shift) < _CLEAR_SHARE * limit:
                del self.alarms[Alarm.ENTROPY]
                logger.info("%s: output entropy is within its limits again", self._name)
        elif abs(shift) > limit:
            self._begin(
                Alarm.ENTROPY,
                f"output entropy is {self.reference.mean + shift:.2f} nats, and the original's was "
                f"{self.reference.mean:.2f}: more than {limit:g} apart",
            )

    def _begin(self, alarm: Alarm, text: str) -> None:
        self.alarms[alarm] = text
        logger.warning("alarm %s of %s: %s; %s", alarm.value, self._name, text, _ADVICE)
        self.on_alarm(alarm, text)
