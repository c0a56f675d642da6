"""Intervals of ratios of sums over documents: mean KL per token, share of flips, log-loss.

The bootstrap draws whole documents, whose tokens hang together, and keeps what two models gave
for one document together. Its intervals are studentised: with few documents and skewed sums,
percentiles alone are too short (Efron and Tibshirani, An Introduction to the Bootstrap, ch. 12).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from compress.measure.figures import Estimate

_RESAMPLES = 2000
# Counts of documents in memory at once.
_PART = 1 << 22

Floats = NDArray[np.float64]


def ratio_estimate(sums_D: Floats, sizes_D: Floats, *, seed: int = 0) -> Estimate:
    """sum(sums) / sum(sizes) with its 95 % interval over the D documents.

    Sums that are not finite give a value of NaN.
    """
    return ratio_estimates([sums_D], sizes_D, seed=seed)[0]


def ratio_estimates(columns: Sequence[Floats], sizes_D: Floats, *, seed: int = 0) -> list[Estimate]:
    """As ``ratio_estimate`` of each, in the time of one: they share what is drawn."""
    found = [_point(sums_D, sizes_D) for sums_D in columns]
    spread = [i for i, one in enumerate(found) if one.low < one.high]
    drawn = _resample([columns[i] for i in spread], sizes_D, seed) if spread else []
    for index, (ratios_B, errors_B) in zip(spread, drawn, strict=True):
        value, error = found[index].value, found[index].standard_error
        t_B = (ratios_B - value) / np.maximum(errors_B, 1e-3 * error)
        low, high = np.quantile(t_B, [0.025, 0.975])
        found[index] = replace(
            found[index], low=value - float(high) * error, high=value - float(low) * error
        )
    return found


def _point(sums_D: Floats, sizes_D: Floats) -> Estimate:
    """The value and its standard error; ``low`` is below ``high`` where an interval is drawn."""
    documents = len(sums_D)
    value = float(sums_D.sum() / sizes_D.sum())
    if not np.isfinite(sums_D).all():
        return Estimate(float("nan"), float("nan"), float("nan"), documents, float("nan"))
    error = float(_errors(_moments(sums_D, sizes_D).sum(axis=0)[None], documents)[0])
    if documents < 2 or error <= 1e-9 * abs(value):
        return Estimate(value, value, value, documents, error)
    return Estimate(value, -np.inf, np.inf, documents, error)


def _resample(columns: Sequence[Floats], sizes_D: Floats, seed: int) -> list[tuple[Floats, Floats]]:
    """Ratios of each column and their standard errors, in each resample."""
    documents, random = len(sizes_D), np.random.default_rng(seed)
    moments = [_moments(sums_D, sizes_D) for sums_D in columns]
    parts: list[list[Floats]] = [[] for _ in columns]
    left = _RESAMPLES
    while left:
        rows = min(left, max(1, _PART // documents))
        counts = random.multinomial(documents, np.full(documents, 1 / documents), size=rows)
        for part, moments_D5 in zip(parts, moments, strict=True):
            part.append(counts @ moments_D5)
        left -= rows
    wholes = [np.concatenate(part) for part in parts]
    return [(one_B5[:, 0] / one_B5[:, 1], _errors(one_B5, documents)) for one_B5 in wholes]


def _moments(sums_D: Floats, sizes_D: Floats) -> Floats:
    """[D, 5]: sum, size, sum squared, size squared, product."""
    return np.stack([sums_D, sizes_D, sums_D**2, sizes_D**2, sums_D * sizes_D], axis=1)


def _errors(moments_B5: Floats, documents: int) -> Floats:
    """Standard errors of ratios by the delta method, from totals over documents."""
    sums_B, sizes_B, sums2_B, sizes2_B, products_B = moments_B5.T
    ratios_B = sums_B / sizes_B
    residuals_B = sums2_B - 2 * ratios_B * products_B + ratios_B**2 * sizes2_B
    spread = documents / max(1, documents - 1)
    result: Floats = np.sqrt(np.maximum(residuals_B, 0) * spread) / sizes_B
    return result
