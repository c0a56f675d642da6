"""What calibration keeps of a linear layer's input: one accumulator for all that share it.

Shape letters: M rows (tokens), K in-features, S rows of the sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.methods.hessian import Factor, factor

# Rows that are kept as they are, for searches that need whole inputs.
SAMPLE_ROWS = 512
# x^T x is symmetric: blocks of so many rows are added up to their diagonal only.
_BLOCK = 256


@dataclass(frozen=True, slots=True)
class OrderedFactor:
    """A factor of the Hessian whose features were put in the order ``order_K``."""

    order_K: Tensor
    factor: Factor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInputs:
    """``hessian_KK`` is the mean of x x^T over ``tokens`` rows, float32."""

    tokens: int
    hessian_KK: Tensor
    absmean_K: Tensor
    absmax_K: Tensor
    sample_SK: Tensor
    _factors: dict[bool, OrderedFactor] = field(default_factory=dict, init=False, repr=False)

    def ordered_factor(self, *, by_activation: bool) -> OrderedFactor:
        """In the order of falling diagonal, or of the features; all linears share it."""
        if by_activation not in self._factors:
            order_K = torch.arange(len(self.hessian_KK))
            if by_activation:
                order_K = self.hessian_KK.diagonal().argsort(descending=True, stable=True)
            found = factor(self.hessian_KK, self.tokens, order_K)
            self._factors[by_activation] = OrderedFactor(order_K, found)
        return self._factors[by_activation]

    def scaled(self, scale_K: Tensor) -> "LayerInputs":
        """The inputs divided by ``scale_K``, feature by feature."""
        return LayerInputs(
            tokens=self.tokens,
            hessian_KK=self.hessian_KK / (scale_K[:, None] * scale_K),
            absmean_K=self.absmean_K / scale_K,
            absmax_K=self.absmax_K / scale_K,
            sample_SK=self.sample_SK / scale_K,
        )

    def output_error(self, difference_NK: Tensor) -> float:
        """Mean over tokens of |x D^T|^2, summed over out-features."""
        error_NK = (difference_NK @ self.hessian_KK).mul_(difference_NK)
        return float(error_NK.sum(dtype=torch.float64))

    def relative_error(self, weight_NK: Tensor, found_NK: Tensor) -> float:
        """Squared output error of ``found_NK`` in shares of the output's square.

        Of the sample where that has fewer rows than features, which is cheaper then.
        """
        original_NK, difference_NK = weight_NK.float(), found_NK - weight_NK
        if len(self.sample_SK) >= len(self.hessian_KK):
            error, scale = self.output_error(difference_NK), self.output_error(original_NK)
        else:
            error = float((self.sample_SK @ difference_NK.t()).square_().sum())
            scale = float((self.sample_SK @ original_NK.t()).square_().sum())
        return error / scale if scale else 0.0


class InputAccumulator:
    """Adds up batches of inputs [M, K]."""

    def __init__(self, columns: int) -> None:
        self._tokens = 0
        self._sum_KK = torch.zeros(columns, columns)
        self._abs_K = torch.zeros(columns, dtype=torch.float64)
        self._max_K = torch.zeros(columns)
        self._sample: list[Tensor] = []

    @property
    def tokens(self) -> int:
        """Rows so far."""
        return self._tokens

    def add(self, x_MK: Tensor, sample_rows: int = SAMPLE_ROWS) -> None:
        """Takes ``sample_rows`` evenly spread rows of the batch into the sample."""
        x_MK = x_MK.float()
        self._tokens += len(x_MK)
        for rows in self._blocks():
            self._sum_KK[rows, : rows.stop].addmm_(x_MK[:, rows].t(), x_MK[:, : rows.stop])
        absolute_MK = x_MK.abs()
        self._abs_K += absolute_MK.sum(0, dtype=torch.float64)
        if len(x_MK):
            self._max_K = torch.maximum(self._max_K, absolute_MK.amax(0))
            kept = torch.linspace(0, len(x_MK) - 1, min(sample_rows, len(x_MK))).long()
            self._sample.append(x_MK[kept])

    def result(self) -> LayerInputs:
        """Raises ``ValueError`` where nothing was seen, or something that is not finite."""
        if not self._tokens:
            raise ValueError("calibration never reached this layer")
        if not bool(self._max_K.isfinite().all()):
            raise ValueError("calibration gave this layer NaN or infinite inputs")
        for rows in self._blocks():
            self._sum_KK[: rows.start, rows] = self._sum_KK[rows, : rows.start].t()
        return LayerInputs(
            tokens=self._tokens,
            hessian_KK=self._sum_KK / self._tokens,
            absmean_K=(self._abs_K / self._tokens).float(),
            absmax_K=self._max_K,
            sample_SK=torch.cat(self._sample),
        )

    def _blocks(self) -> Iterator[slice]:
        columns = len(self._sum_KK)
        for first in range(0, columns, _BLOCK):
            yield slice(first, min(first + _BLOCK, columns))
