"""Every group in every scheme, rounded once on what its layers read in the original model.

On the disk: packed weights, from which any mixture of schemes can be put together.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from compress.auto.candidates import ORIGINAL, Group
from compress.block import Captured, compress_block
from compress.cache import CACHE_REMEDY
from compress.errors import writing
from compress.linears import Linears
from compress.manifest import LayerRow
from compress.plan import Plan
from compress.progress import Progress
from compress.sequential import Sequential
from compress.steps import linear_steps
from compress.store import LayerStore
from engine.blocks import Blocks
from engine.formats.checkpoint import Checkpoint


class Library:
    """Fills ``folder``. ``errors[group][scheme]`` is tr(D H D^T) of the rounding error D; schemes
    that rows cannot have are left out.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plans: Mapping[str, Plan],
        groups: Sequence[Group],
        folder: Path,
    ) -> None:
        """``plans`` are those of uniform recipes, by scheme."""
        self._plans = plans
        self._groups = groups
        self._linears = Linears(checkpoint, next(iter(plans.values())).transposed)
        self._stores: dict[str, LayerStore] = {}
        for number, scheme in enumerate(plans):
            with writing(folder, CACHE_REMEDY):
                (folder / str(number)).mkdir()
            self._stores[scheme] = LayerStore(folder / str(number))
        self._folder = folder
        self.errors: list[dict[str, float]] = [{ORIGINAL: 0.0} for _ in groups]

    @torch.inference_mode()
    def fill(self, blocks: Blocks, ids_SL: Tensor, progress: Progress) -> None:
        """Rounds all layers. Raises ``CompressError``."""
        with writing(self._folder, CACHE_REMEDY):
            state = Sequential(blocks, ids_SL, self._folder)
        layers, begin = len(blocks.spec.layers), time.perf_counter()
        for index in range(layers):
            self._layer(index, state)
            state.advance(index, {})
            each = (time.perf_counter() - begin) / (index + 1)
            progress.layer(index + 1, layers, f"layer {index}", each * (layers - index - 1))

    def changed(self, index: int, schemes: Mapping[str, str]) -> dict[str, Tensor]:
        """Floating tensors of decoder layer ``index``: ``schemes`` of its modules, by name."""
        found: dict[str, Tensor] = {}
        for scheme in set(schemes.values()) - {ORIGINAL}:
            modules = {name for name, one in schemes.items() if one == scheme}
            found |= self._linears.floating(self._stores[scheme], index, modules)
        return found

    def _layer(self, index: int, state: Sequential) -> None:
        mine = {i: group for i, group in enumerate(self._groups) if group.layer == index}
        modules = {module for group in mine.values() for module in group.modules}
        captured = state.capture(index, modules) if modules else {}
        energy = {
            module: inputs.output_error(self._linears.read(f"{module}.weight").float())
            for shared, inputs in captured.items()
            for module in shared
            if module in modules
        }
        for scheme, plan in self._plans.items():
            rows = self._round(index, scheme, plan, modules, captured)
            for i, group in mine.items():
                if all(module in rows for module in group.modules):
                    self.errors[i][scheme] = sum(
                        (rows[module].output_error or 0.0) * energy[module]
                        for module in group.modules
                    )

    def _round(
        self, index: int, scheme: str, plan: Plan, modules: set[str], captured: Captured
    ) -> dict[str, LayerRow]:
        """The rows of those linears of layer ``index`` that can have ``scheme``."""
        layer, names = plan.spec.layers[index], plan.spec.names[index]
        steps = {
            module: linear_steps(plan.treatments[module], self._linears.dtype(module))
            for module in sorted(modules)
            if not plan.treatments[module].fell_back
        }
        result = compress_block(layer, names, steps, self._linears.read, dict(captured))
        tensors, rows = self._linears.pack(result.linears, plan.treatments)
        if rows:
            with writing(self._folder, CACHE_REMEDY):
                self._stores[scheme].save(index, tensors, rows, 0.0)
        return {row.name: row for row in rows}
