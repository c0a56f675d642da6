"""Round to nearest: the baseline that every other quantiser must beat."""

from dataclasses import dataclass

from torch import Tensor

from compress.methods.base import Outcome, Rounded, best, rounded
from compress.methods.grid import make_grid
from compress.methods.inputs import LayerInputs
from compress.methods.scheme import Scheme

NAME = "rtn"


@dataclass(frozen=True, slots=True)
class Rtn:
    """Each weight becomes the nearest point of its group's grid; needs no calibration."""

    scheme: Scheme

    def quantise(
        self, weight_NK: Tensor, inputs: LayerInputs | None = None, mask_NK: Tensor | None = None
    ) -> Rounded:
        """See ``Quantiser.quantise``."""
        kept_NK = weight_NK if mask_NK is None else weight_NK.masked_fill(mask_NK, 0)
        grid = make_grid(kept_NK, self.scheme)
        weight = grid.weight(grid.quantize(kept_NK))
        outcome = Outcome(method=NAME, errors={})
        if inputs is not None:
            outcome = best(weight_NK, {NAME: weight.dequantize()}, inputs, None)
        return rounded(kept_NK, weight, grid, outcome)
