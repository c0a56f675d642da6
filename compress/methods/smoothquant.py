"""SmoothQuant (arXiv 2211.10438): moves outliers from activations into weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.methods.grid import make_grid
from compress.methods.inputs import LayerInputs
from compress.methods.scheme import Scheme
from engine.kernels.reference import float8_activations, quantize_activations

NAME = "smoothquant"
_LEAST = 1e-5


@dataclass(frozen=True, slots=True)
class SmoothQuant:
    """scale = max|x|^alpha / max|w|^(1 - alpha) of each in-feature.

    Never worse than 1 by the output error, on the sample, of ``scheme``'s weights and of
    activations that are int8, or FP8 where weights are.
    """

    alpha: float
    scheme: Scheme

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie between 0 and 1, not be {self.alpha}")

    def search(self, weights: Sequence[Tensor], inputs: LayerInputs) -> Tensor:
        """See ``Scaling.search``."""
        w_K = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)
        x_K = inputs.absmax_K.clamp_min(_LEAST)
        scale_K = (x_K**self.alpha / w_K.clamp_min(_LEAST) ** (1 - self.alpha)).clamp_min(_LEAST)
        unit_K = torch.ones_like(scale_K)
        better = self._error(weights, inputs, scale_K) < self._error(weights, inputs, unit_K)
        return scale_K if better else unit_K

    def _error(self, weights: Sequence[Tensor], inputs: LayerInputs, scale_K: Tensor) -> float:
        quantise = float8_activations if self.scheme.kind == "float8" else quantize_activations
        q_SK, scale_S = quantise(inputs.sample_SK / scale_K)
        rounded_SK = q_SK.float() * scale_S[:, None]
        error = 0.0
        for weight_NK in weights:
            scaled_NK = weight_NK.float() * scale_K
            grid = make_grid(scaled_NK, self.scheme)
            found_NK = grid.weight(grid.quantize(scaled_NK)).dequantize()
            wanted_SN = inputs.sample_SK @ weight_NK.float().t()
            error += float((rounded_SK @ found_NK.t() - wanted_SN).square().sum())
        return error
