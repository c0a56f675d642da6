"""What a sampled step showed of the model's inside; from the engine to its front end.

Counts and sums of one step: averages and alarms are made of them by who gets them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFigures:
    """One decoder layer: what its linear layers read, in the rows that were looked at.

    Of the ``rounded`` values, those of finite rows that a product reads as int8 or FP8,
    ``zeroed`` are not 0 and become 0, and ``saturated`` become the format's largest level.
    ``outlier`` is the largest absmax / rms of a finite row, 0 where there is none.
    ``non_finite`` counts values, ``kv_non_finite`` scales of the KV pages: a scale overflows
    where a key or a value is NaN or infinite.
    """

    rounded: int = 0
    zeroed: int = 0
    saturated: int = 0
    outlier: float = 0.0
    non_finite: int = 0
    kv_non_finite: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFigures:
    """One step. ``layers`` and ``entropies`` are empty where it was not sampled.

    ``rows`` of the step's tokens were looked at in each layer; ``entropies`` are those of the
    next token's distribution in nats, before temperature and penalties, of rows whose logits
    are finite. ``non_finite_logits`` counts rows of all that sample, in every step.
    """

    rows: int = 0
    layers: tuple[LayerFigures, ...] = ()
    entropies: tuple[float, ...] = ()
    non_finite_logits: int = 0
