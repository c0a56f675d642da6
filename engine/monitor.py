"""Looks inside a few of the steps that serve. The others run as if there were no monitor.

A sampled step runs its layers kernel by kernel, where each linear layer's input can be seen; its
results have the same bits. Shape letters: N matrices, M rows, K in-features, T tokens, R rows
of logits, V vocabulary.
"""

import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from engine.config import MonitorConfig
from engine.figures import LayerFigures, StepFigures
from engine.formats.float_quantized import LARGEST
from engine.kernels.reference import float8_activations, quantize_activations
from engine.kernels.torch_sampling import finite_rows
from engine.kv_cache import KvCache
from engine.layers.linear import Linear, Split, activations

# Rows of a step, and of its logits, that are looked at: bounds the time that it costs.
ROWS = 16
# What rounds activations, and the format's largest level.
_QUANTIZERS = {
    "int8": (quantize_activations, 127.0),
    "float8_e4m3": (float8_activations, LARGEST),
}


def input_figures(x_NMK: Tensor, rounding: str) -> list[LayerFigures]:
    """What linear layers that read each of N matrices [M, K] as ``rounding`` do to it.

    ``rounding`` is int8, float8_e4m3 or float32; the arithmetic is that of
    ``reference.quantize_activations`` and ``float8_activations``.
    """
    finite_NMK = x_NMK.isfinite()
    good_NM = finite_NMK.all(dim=2)
    x_NMK = x_NMK.masked_fill(~good_NM[..., None], 0.0)
    # Shares of the largest, whose squares neither overflow nor vanish; a zero row's are NaN.
    share_NMK = x_NMK / x_NMK.abs().amax(dim=2, keepdim=True)
    outlier_N = share_NMK.square().mean(dim=2).rsqrt().nan_to_num(nan=0.0).amax(dim=1)
    found = [outlier_N, (~finite_NMK).sum(dim=(1, 2))]
    if rounding != "float32":
        level_NMK, largest = _levels(x_NMK, rounding)
        rounded_N = good_NM.sum(dim=1) * x_NMK.shape[2]
        zeroed_N = ((level_NMK == 0) & (x_NMK != 0)).sum(dim=(1, 2))
        found += [rounded_N, zeroed_N, (level_NMK >= largest).sum(dim=(1, 2))]
    names = ("outlier", "non_finite", "rounded", "zeroed", "saturated")
    columns = zip(*(each.tolist() for each in found), strict=True)
    return [LayerFigures(**dict(zip(names, column, strict=False))) for column in columns]


def _levels(x_NMK: Tensor, rounding: str) -> tuple[Tensor, float]:
    """float32 magnitudes of the levels, and the largest."""
    quantize, largest = _QUANTIZERS[rounding]
    levels, _ = quantize(x_NMK.flatten(0, 1))
    return levels.float().abs().view(x_NMK.shape), largest


def entropies(logits_RV: Tensor) -> tuple[float, ...]:
    """Entropy in nats of each row whose logits are finite."""
    log_p_RV = logits_RV[finite_rows(logits_RV)].float().log_softmax(dim=1)
    return tuple((-(log_p_RV.exp() * log_p_RV).sum(dim=1)).tolist())


class Look:
    """One sampled step: is told what there is to see, and makes figures of it."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        # Matrices of a size are looked at together: the time goes with the number of operations.
        self._inputs: dict[tuple[str, torch.Size], list[tuple[int, Tensor]]] = defaultdict(list)
        self._entropies: tuple[float, ...] = ()

    def observe(self, layer: int, linear: Linear, x_MK: Tensor) -> None:
        """Layer ``layer`` has ``linear`` read ``x_MK``, which may change afterwards."""
        rows_MK = some(x_MK).clone()
        self._inputs[_rounding(linear), rows_MK.shape].append((layer, rows_MK))

    def logits(self, logits_RV: Tensor) -> None:
        """The model's own, before anything changes them."""
        self._entropies = entropies(some(logits_RV))

    def figures(self, cache: KvCache, slots_T: Tensor, non_finite_logits: int) -> StepFigures:
        """All of it, with the scales at the slots that the step has written."""
        slots = some(slots_T)
        scales = cache.written_scales(slots)
        broken = [0] * self._layers
        if scales is not None:
            broken = (~scales.isfinite()).flatten(1).sum(dim=1).tolist()
        return StepFigures(
            rows=len(slots),
            layers=tuple(map(_sum, self._of_layers(), broken)),
            entropies=self._entropies,
            non_finite_logits=non_finite_logits,
        )

    def _of_layers(self) -> list[list[LayerFigures]]:
        found: list[list[LayerFigures]] = [[] for _ in range(self._layers)]
        for (rounding, _), inputs in self._inputs.items():
            stacked_NMK = torch.stack([x_MK for _, x_MK in inputs])
            figures = input_figures(stacked_NMK, rounding)
            for (layer, _), one in zip(inputs, figures, strict=True):
                found[layer].append(one)
        return found


class Monitor:
    """Says which steps are looked at: at most one in ``every_steps``, ``gap_s`` apart."""

    def __init__(
        self, config: MonitorConfig, layers: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._layers = layers
        self._clock = clock
        self._steps = 0
        self._last = -float("inf")

    def __repr__(self) -> str:
        return f"<Monitor of {self._layers} layers, {self._config}, {self._steps} steps since>"

    def look(self) -> Look | None:
        """For the step that begins; None where it is not sampled."""
        self._steps += 1
        if not self._config.every_steps or self._steps < self._config.every_steps:
            return None
        now = self._clock()
        if now - self._last < self._config.gap_s:
            return None
        self._steps, self._last = 0, now
        return Look(self._layers)


def some(x: Tensor) -> Tensor:
    """At most ``ROWS`` rows, spread evenly; the last one is always there."""
    if len(x) <= ROWS:
        return x
    return x[torch.linspace(0, len(x) - 1, ROWS).round().long()]


def _rounding(linear: Linear) -> str:
    """What ``linear`` reads its input as; of several parts the one that rounds."""
    parts = linear.parts if isinstance(linear, Split) else (linear,)
    read = {activations(part) for part in parts}
    return next((kind for kind in ("int8", "float8_e4m3") if kind in read), "float32")


def _sum(inputs: list[LayerFigures], kv_non_finite: int) -> LayerFigures:
    return LayerFigures(
        rounded=sum(one.rounded for one in inputs),
        zeroed=sum(one.zeroed for one in inputs),
        saturated=sum(one.saturated for one in inputs),
        outlier=max((one.outlier for one in inputs), default=0.0),
        non_finite=sum(one.non_finite for one in inputs),
        kv_non_finite=kv_non_finite,
    )
