"""Layer after layer: capture what its linears read, compress it, and pass on what it now gives.

So each layer is calibrated on the outputs of its compressed predecessors. Memory holds one
layer and one Hessian for each shared input; the hidden states of all samples lie in a mapped
file where they are large.
"""

import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.methods.inputs import InputAccumulator, LayerInputs
from engine.blocks import Blocks, Observe
from engine.kernels.cpu.memory import give_back

# Hidden states of this size and more lie in a file.
MAPPED_BYTES = 64 << 20
# Tokens that run through a layer at once: bounds the activations between its linears.
_STEP_TOKENS = 1024


class Sequential:
    """The state of all samples [S, L, K] between two layers."""

    def __init__(self, blocks: Blocks, ids_SL: Tensor, folder: Path) -> None:
        """``folder`` is for the file. Raises ``OSError`` where it has no room."""
        self._blocks = blocks
        self._hidden_SLK = scratch((*ids_SL.shape, blocks.spec.layer.hidden_size), folder)
        for part, ids_BL in zip(self._parts(), ids_SL.split(len(self._parts()[0])), strict=True):
            part.copy_(blocks.embed(ids_BL))

    def is_finite(self) -> bool:
        """Whether what the next layer reads is."""
        return all(bool(part.isfinite().all()) for part in self._parts())

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
        give_back()
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


def scratch(shape: tuple[int, ...], folder: Path) -> Tensor:
    """float32, not initialised: in memory, or in a file of ``folder`` that has no name any more.

    Raises ``OSError`` where the disk has no room: a mapped page that finds none kills a process.
    """
    size = math.prod(shape)
    if 4 * size < MAPPED_BYTES:
        return torch.empty(shape)
    descriptor, name = tempfile.mkstemp(suffix=".hidden", dir=folder)
    try:
        os.posix_fallocate(descriptor, 0, 4 * size)
        return torch.from_file(name, shared=True, size=size, dtype=torch.float32).view(shape)
    finally:
        os.close(descriptor)
        Path(name).unlink()


def _result(modules: tuple[str, ...], accumulator: InputAccumulator) -> LayerInputs:
    try:
        return accumulator.result()
    except ValueError as error:
        raise CompressError(_cold(modules[0], str(error))) from error


def _cold(module: str, reason: str) -> str:
    return f"{module}: {reason}: give other calibration text, or name the layer under ignore"
