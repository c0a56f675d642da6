"""Magnitude pruning: the smallest weights go; the baseline that other pruners must beat."""

from dataclasses import dataclass

from torch import Tensor

from compress.methods.base import Pruned, best
from compress.methods.inputs import LayerInputs
from compress.methods.masks import Sparsity, lowest

NAME = "magnitude"


@dataclass(frozen=True, slots=True)
class Magnitude:
    """Unstructured sparsity is that of the whole matrix, not of each row."""

    sparsity: Sparsity

    def prune(self, weight_NK: Tensor, inputs: LayerInputs) -> Pruned:
        """See ``Pruner.prune``."""
        mask_NK = magnitude_mask(weight_NK, self.sparsity)
        pruned_NK = weight_NK.float().masked_fill(mask_NK, 0)
        return Pruned(
            weight_NK=pruned_NK,
            mask_NK=mask_NK,
            outcome=best(weight_NK, {NAME: pruned_NK}, inputs, None),
        )


def magnitude_mask(weight_NK: Tensor, sparsity: Sparsity) -> Tensor:
    """True for the smallest weights."""
    return lowest(weight_NK.float().abs(), sparsity, per_row=False)
