"""The drop of an accuracy between two models that answer the same questions. No tensors.

Tango's score interval (Statistics in Medicine 17, 1998): unlike a bootstrap, it does not become
empty where no answer changed.
"""

import math
from statistics import NormalDist

from compress.measure.figures import LEVEL, Estimate

_Z = NormalDist().inv_cdf(LEVEL)


def drop_estimate(lost: int, gained: int, items: int) -> Estimate:
    """Accuracy lost, as a share of ``items``: ``lost`` answers became wrong, ``gained`` right."""
    value = (lost - gained) / items
    low = _root(lost, gained, items, _Z, -1.0, value)
    high = _root(lost, gained, items, -_Z, value, 1.0)
    return Estimate(value, low, high, items, (high - low) / (2 * _Z))


def _root(lost: int, gained: int, items: int, wanted: float, low: float, high: float) -> float:
    """Where the score, which falls as the drop rises, has the value ``wanted``."""
    for _ in range(60):
        middle = (low + high) / 2
        if _score(lost, gained, items, middle) > wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _score(lost: int, gained: int, items: int, drop: float) -> float:
    """Standardised distance of the drop found from ``drop``."""
    linear = drop * (2 * items - lost + gained) - lost - gained
    root = math.sqrt(max(0.0, linear**2 + 8 * items * gained * drop * (1 - drop)))
    # The likeliest share of gained answers if the true drop were ``drop``.
    share = (root - linear) / (4 * items)
    variance = items * (2 * share + drop * (1 - drop))
    distance = lost - gained - items * drop
    if variance <= 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / math.sqrt(variance)
