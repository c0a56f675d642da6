"""A recipe's ``auto``: what is asked of the search, and what came of it. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

Budget = Literal["bits", "bytes", "tokens_per_second"]
BUDGETS: tuple[Budget, ...] = ("bits", "bytes", "tokens_per_second")


@dataclass(frozen=True, slots=True, kw_only=True)
class Auto:
    """``budget`` says what ``limit`` is: stored bits per targeted weight with its scales, stored
    bytes of targeted weights, or tokens per second of decoding one sequence on this host.

    Swaps are tried until ``time_budget`` seconds of searching are over, or ``swaps`` of them.
    """

    budget: Budget
    limit: float
    time_budget: float = 600.0
    swaps: int = 16
    ignore: tuple[str, ...] = ("lm_head",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A model on the frontier that was walked: KL of its final logits in nats per token.

    ``nbytes`` are those of the targeted weights; ``tokens_per_second`` is predicted, where the
    budget is one of speed; ``schemes`` are shares of the weights; ``uniform``: one for all groups,
    measured beside the mixtures.
    """

    name: str
    bits: float
    nbytes: int
    predicted_kl: float
    kl: float
    tokens_per_second: float | None = None
    schemes: tuple[tuple[str, float], ...] = ()
    chosen: bool = False
    uniform: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier:
    """All points by size; ``tokens`` of text judged them, and ``stopped`` says what ended it.

    ``curve`` is what was predicted between the ends, as (bits, KL).
    """

    points: tuple[Point, ...]
    curve: tuple[tuple[float, float], ...]
    tokens: int
    measured: int
    stopped: str

    @property
    def chosen(self) -> Point:
        """The point that the recipe asks for."""
        return next(point for point in self.points if point.chosen)

    def bits_within(self, limit: float) -> float | None:
        """The fewest bits at which a KL of at most ``limit`` is predicted; None: none here."""
        return min((bits for bits, kl in self.curve if kl <= limit), default=None)
