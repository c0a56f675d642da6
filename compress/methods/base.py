"""What methods are: pure functions of a layer's weight and of what its inputs were.

A scaling chooses factors that move from inputs into weights, a pruner chooses weights to
drop, a quantiser rounds. Each is a frozen dataclass of its hyper-parameters and knows no model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compress.methods.grid import Grid, RoundedWeight, row_blocks
from compress.methods.inputs import LayerInputs
from engine.formats.int_quantized import Int8Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The method that was kept, and what each contender cost.

    ``errors`` are mean squared output errors relative to the layer's output, by method, on
    the captured inputs; empty without any. ``rung`` is the step of the Hessian's ladder,
    None where no Hessian was used.
    """

    method: str
    errors: Mapping[str, float]
    rung: str | None = None

    @property
    def error(self) -> float | None:
        """Of the method that was kept."""
        return self.errors.get(self.method)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """A quantised layer.

    ``relative_error`` is |W - W'| / |W| in the Frobenius norm (0 for a zero weight);
    ``clipped_share`` the share of weights whose nearest grid point lay outside the grid.
    """

    weight: RoundedWeight
    outcome: Outcome
    relative_error: float
    clipped_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """A pruned layer: float32 ``weight_NK``, 0 where ``mask_NK`` is True."""

    weight_NK: Tensor
    mask_NK: Tensor
    outcome: Outcome


class Quantiser(Protocol):
    """Rounds a weight [N, K], bf16, fp16 or fp32, all finite, which is left as it is."""

    def quantise(
        self, weight_NK: Tensor, inputs: LayerInputs | None, mask_NK: Tensor | None = None
    ) -> Rounded:
        """Weights under ``mask_NK`` become 0. ``inputs`` None: there was no calibration."""
        ...


class Pruner(Protocol):
    """Drops weights; what a quantiser must leave finite and unchanged, a pruner must too."""

    def prune(self, weight_NK: Tensor, inputs: LayerInputs) -> Pruned:
        """At the sparsity that the pruner was made for."""
        ...


class Scaling(Protocol):
    """Chooses what inputs are divided by and weights multiplied with, feature by feature."""

    def search(self, weights: Sequence[Tensor], inputs: LayerInputs) -> Tensor:
        """Positive float32 [K] for weights [N, K] that read the same input; 1 where best."""
        ...


def best(
    weight_NK: Tensor, candidates: Mapping[str, Tensor], inputs: LayerInputs, rung: str | None
) -> Outcome:
    """The candidate [N, K] with the least output error; the first of a tie.

    The last candidate is the baseline: it stays where no error is finite.
    """
    original_NK = weight_NK.float()
    scale = max(inputs.output_error(original_NK), torch.finfo(torch.float32).tiny)
    errors = {
        name: inputs.output_error(candidate_NK.float() - original_NK) / scale
        for name, candidate_NK in candidates.items()
    }
    finite = {name: error for name, error in errors.items() if math.isfinite(error)}
    kept = min(finite, key=lambda name: finite[name]) if finite else list(errors)[-1]
    return Outcome(method=kept, errors=errors, rung=rung)


def rounded(weight_NK: Tensor, weight: RoundedWeight, grid: Grid, outcome: Outcome) -> Rounded:
    """``weight`` as a result, with its errors against ``weight_NK``."""
    error = norm = 0.0
    for rows in row_blocks(weight_NK):
        original_NK = weight_NK[rows].float()
        norm += _sum_of_squares(original_NK)
        error += _sum_of_squares(_rows(weight, rows).dequantize().sub_(original_NK))
    return Rounded(
        weight=weight,
        outcome=outcome,
        relative_error=math.sqrt(error / norm) if norm else 0.0,
        clipped_share=grid.clipped_share(weight_NK),
    )


def _rows(weight: RoundedWeight, rows: slice) -> RoundedWeight:
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.q_NK[rows], weight.scale_N[rows])
    return weight.rows(rows)


def _sum_of_squares(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
