"""Who gives its blocks up when there are none left."""

from engine.types import Sequence


def cheapest(sequences: list[Sequence]) -> Sequence:
    """Of the lowest priority, the one with fewest tokens to compute again; of equals the last."""
    return min(reversed(sequences), key=lambda s: (s.request.priority, s.computed))
