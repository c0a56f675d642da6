"""Whether sparse layers pay on this machine: measured at load, once for each shape.

Both forms give the same bits, so that time alone may decide. What does not win runs with its zeros,
and the log and the report say so.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engine.kernels.cpu.sparse import PackedSparseLinear
from engine.layers.linear import Linear, Split

logger = logging.getLogger(__name__)

# Rows at which both are timed, and the least speed-up: one sequence must gain, eight must not lose.
LEAST = {1: 1.05, 8: 1.0}
# More than the caches of a core and its share of the common one.
_CACHES = 96 << 20
_PASSES = 7


class SpeedGate:
    """``weights``: how many all sparse layers of the model have, which run one after the other."""

    def __init__(self, weights: int) -> None:
        self._weights = weights
        self._speed_ups: dict[tuple[int, int], Mapping[int, float]] = {}

    def choose(self, linear: Linear) -> Linear:
        """``linear``, or where it is sparse and does not win, the same with its zeros."""
        if isinstance(linear, Split):
            return replace(linear, parts=tuple(self.choose(part) for part in linear.parts))
        if not isinstance(linear, PackedSparseLinear):
            return linear
        shape = (linear.outs, linear.columns)
        if shape not in self._speed_ups:
            size = linear.outs * linear.columns
            copies = max(1, -(-min(self._weights, _CACHES) // size))
            self._speed_ups[shape] = speed_ups(linear, copies)
            logger.info("%s", _verdict(shape, self._speed_ups[shape]))
        return linear if _wins(self._speed_ups[shape]) else linear.dense()

    @property
    def verdicts(self) -> tuple[str, ...]:
        """What was measured, a line for each shape."""
        return tuple(_verdict(shape, found) for shape, found in self._speed_ups.items())


def speed_ups(linear: PackedSparseLinear, copies: int) -> dict[int, float]:
    """Rows -> speed over the same layer with its zeros.

    Both run through as many copies as the model has layers of their size, or as the caches cannot
    hold. Of each copy the fastest call counts, and of the copies the median, since what other
    processes take is no property of a kernel.
    """
    sparse = [linear, *(linear.copy() for _ in range(copies - 1))]
    dense = [linear.dense() for _ in range(copies)]
    found = {}
    for rows in LEAST:
        x_MK = torch.ones(rows, linear.columns)
        passes = [(_one_pass(dense, x_MK), _one_pass(sparse, x_MK)) for _ in range(_PASSES)]
        whole, kept = (torch.tensor(times).amin(0).median() for times in zip(*passes, strict=True))
        found[rows] = float(whole / kept)
    return found


def _one_pass(layers: Sequence[Callable[[Tensor], Tensor]], x_MK: Tensor) -> list[float]:
    """Each layer's seconds."""
    times = []
    for layer in layers:
        begin = time.perf_counter()
        layer(x_MK)
        times.append(time.perf_counter() - begin)
    return times


def _wins(found: Mapping[int, float]) -> bool:
    return all(found[rows] >= least for rows, least in LEAST.items())


def _verdict(shape: tuple[int, int], found: Mapping[int, float]) -> str:
    how = "without its zeros" if _wins(found) else "dense"
    ratios = ", ".join(f"{ratio:.2f}x at {rows}" for rows, ratio in found.items())
    return f"sparse {shape[0]}x{shape[1]}={how} (measured {ratios})"
