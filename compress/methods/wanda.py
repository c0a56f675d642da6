"""Wanda (arXiv 2306.11695): the lowest |W| * |x| of each row go; the others stay as they are."""

from dataclasses import dataclass

from torch import Tensor

from compress.methods import magnitude
from compress.methods.base import Pruned, best
from compress.methods.inputs import LayerInputs
from compress.methods.masks import Sparsity, lowest

NAME = "wanda"


@dataclass(frozen=True, slots=True)
class Wanda:
    """Never worse than magnitude at the same sparsity: the better of the two is kept."""

    sparsity: Sparsity

    def prune(self, weight_NK: Tensor, inputs: LayerInputs) -> Pruned:
        """See ``Pruner.prune``."""
        score_NK = weight_NK.float().abs() * inputs.hessian_KK.diagonal().sqrt()
        masks = {
            NAME: lowest(score_NK, self.sparsity, per_row=True),
            magnitude.NAME: magnitude.magnitude_mask(weight_NK, self.sparsity),
        }
        pruned = {name: weight_NK.float().masked_fill(mask, 0) for name, mask in masks.items()}
        outcome = best(weight_NK, pruned, inputs, None)
        kept = outcome.method
        return Pruned(weight_NK=pruned[kept], mask_NK=masks[kept], outcome=outcome)
