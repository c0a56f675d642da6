"""Layer after layer: capture what its linears read, compress it, and pass on what it now gives.

So each layer is calibrated on the outputs of its compressed predecessors. Memory holds one
layer, the hidden states of all samples, and one Hessian for each shared input.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.block import BlockResult
from compress.errors import CompressError
from compress.methods.inputs import InputAccumulator, LayerInputs
from engine.blocks import Blocks, Observe

# Tokens that run through a layer at once: bounds the activations between its linears.
_STEP_TOKENS = 1024


class Sequential:
    """The state of all samples [S, L, K] between two layers."""

    def __init__(self, blocks: Blocks, ids_SL: Tensor) -> None:
        self._blocks = blocks
        self._hidden_SLK = blocks.embed(ids_SL)

    @property
    def hidden_SLK(self) -> Tensor:
        """What the next layer reads."""
        return self._hidden_SLK

    @torch.inference_mode()
    def capture(self, index: int, wanted: set[str]) -> dict[tuple[str, ...], LayerInputs]:
        """Runs layer ``index`` as it is; what the linears ``wanted`` read, by shared input.

        Raises:
            CompressError: a linear saw no token, or something that is not finite.
        """
        captured: dict[tuple[str, ...], InputAccumulator] = {}

        def observe(modules: tuple[str, ...], x_MK: Tensor) -> None:
            if wanted & set(modules):
                if modules not in captured:
                    captured[modules] = InputAccumulator(x_MK.shape[1])
                captured[modules].add(x_MK, sample_rows)

        layer = self._blocks.layer(index, {}, observe)
        parts = self._parts()
        sample_rows = -(-512 // len(parts))
        for part in parts:
            self._blocks.run(layer, index, part)
        del layer
        missed = wanted - {module for modules in captured for module in modules}
        if missed:
            raise CompressError(_cold(min(missed), "calibration never reached this layer"))
        return {modules: _result(modules, captured[modules]) for modules in list(captured)}

    @torch.inference_mode()
    def advance(
        self, index: int, changed: Mapping[str, Tensor], observe: Observe | None = None
    ) -> None:
        """Runs layer ``index`` with the tensors ``changed``; its outputs are the next inputs.

        ``observe`` sees what its linears read.
        """
        layer = self._blocks.layer(index, changed, observe)
        for part in self._parts():
            part.copy_(self._blocks.run(layer, index, part))

    def _parts(self) -> tuple[Tensor, ...]:
        size = max(1, _STEP_TOKENS // self._hidden_SLK.shape[1])
        parts: tuple[Tensor, ...] = self._hidden_SLK.split(size)
        return parts


def changed_tensors(result: BlockResult) -> dict[str, Tensor]:
    """A compressed layer's tensors, floating, by their names in the original checkpoint."""
    changed = dict(result.vectors)
    for name, one in result.linears.items():
        weight = one.weight
        changed[f"{name}.weight"] = weight if isinstance(weight, Tensor) else weight.dequantize()
    return changed


def _result(modules: tuple[str, ...], accumulator: InputAccumulator) -> LayerInputs:
    try:
        return accumulator.result()
    except ValueError as error:
        raise CompressError(_cold(modules[0], str(error))) from error


def _cold(module: str, reason: str) -> str:
    return f"{module}: {reason}: give other calibration text, or name the layer under ignore"
