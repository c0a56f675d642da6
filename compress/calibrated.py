"""The calibrated part of a job: decoder layer after decoder layer, each saved when it is done."""

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from compress.allocation import allocated, find_sparsities, with_sparsities
from compress.block import BlockResult, compress_block
from compress.calibration import read_samples
from compress.errors import CompressError
from compress.generated import generate
from compress.linears import Linears
from compress.methods import METHODS
from compress.methods.hessian import LAST_RUNG
from compress.plan import Plan
from compress.progress import Progress
from compress.recipe import Recipe
from compress.sequential import Sequential
from compress.steps import linear_steps
from compress.store import LayerStore
from compress.treatment import Treatment
from engine.blocks import Blocks
from engine.formats.checkpoint import Checkpoint
from engine.kernels.cpu.memory import give_back

_IDS, _SPARSITIES = "calibration", "sparsities"
# More layers than this share whose Hessian could not be used fail the run.
_MOST_BAD_HESSIANS = 0.1


class CalibratedRun:
    """Fills ``store`` with all layers of ``plan``."""

    def __init__(
        self, recipe: Recipe, plan: Plan, checkpoint: Checkpoint, store: LayerStore
    ) -> None:
        self._recipe = recipe
        self._plan = plan
        self._checkpoint = checkpoint
        self.store = store
        self._treatments: Mapping[str, Treatment] = plan.treatments
        self._linears = Linears(checkpoint, plan.transposed)
        self._blocks = Blocks.open(checkpoint)
        self.ids_SL = torch.empty(0)

    def run(self, progress: Progress) -> None:
        """Raises ``CompressError``: text or activations are not as needed."""
        self.ids_SL = self._samples(progress)
        if allocated(self._plan):
            self._treatments = with_sparsities(self._plan, self._sparsities(progress))
        layers = len(self._plan.spec.layers)
        detail = f"{len(self._plan.treatments)} linears of {layers} layers"
        progress.phase("compressing", f"{detail} on {self.ids_SL.numel()} tokens")
        state = Sequential(self._blocks, self.ids_SL, self.store.folder)
        begin, done = time.perf_counter(), 0
        for index in range(layers):
            finished = self.store.has(index)
            if not finished:
                self._compress(index, state)
                done += 1
                each = (time.perf_counter() - begin) / done
                name = f"layer {index}"
                progress.layer(index + 1, layers, name, each * (layers - index - 1))
            state.advance(index, self._changed(index))
        if not state.is_finite():
            raise CompressError("the compressed model gives NaN or infinite hidden states")
        self._check_hessians()

    def _samples(self, progress: Progress) -> Tensor:
        calibration = self._recipe.calibration
        assert calibration is not None
        saved = self.store.extra(_IDS)
        if saved is not None:
            return saved
        most = self._plan.spec.context_length
        size = {"samples": calibration.samples, "length": min(calibration.length, most)}
        folder, seed = self._checkpoint.folder, self._recipe.seed
        if calibration.source == "file":
            ids_SL = read_samples(folder, [Path(p) for p in calibration.paths], **size, seed=seed)
        else:
            progress.phase("generating", f"{size['samples']} x {size['length']} tokens")
            ids_SL = generate(folder, **size, seed=seed, int8_weights=True)
        self.store.save_extra(_IDS, ids_SL)
        return ids_SL

    def _sparsities(self, progress: Progress) -> Tensor:
        saved = self.store.extra(_SPARSITIES)
        if saved is not None:
            return saved
        progress.phase("allocating", "sparsities of the decoder layers")
        state = Sequential(self._blocks, self.ids_SL, self.store.folder)
        found = find_sparsities(self._plan, state, self._linears.read)
        self.store.save_extra(_SPARSITIES, found)
        return found

    @torch.inference_mode()
    def _compress(self, index: int, state: Sequential) -> None:
        layer, names = self._plan.spec.layers[index], self._plan.spec.names[index]
        modules = [module for matrix in names.matrices() for module in matrix.modules]
        treated = {m: self._treatments[m] for m in modules if m in self._treatments}
        wanted = {
            module
            for module, one in treated.items()
            if any(METHODS[modifier.type].calibrated for modifier in one.modifiers)
        }
        begin = time.perf_counter()
        captured = state.capture(index, wanted) if wanted else {}
        steps = {m: linear_steps(one, self._linears.dtype(m)) for m, one in treated.items()}
        result = compress_block(layer, names, steps, self._linears.read, captured)
        seconds = (time.perf_counter() - begin) / max(1, len(treated))
        self._save(index, result, seconds)
        del captured, result
        give_back()

    def _save(self, index: int, result: BlockResult, seconds: float) -> None:
        tensors, rows = self._linears.pack(result.linears, self._treatments)
        self.store.save(index, {**result.vectors, **tensors}, rows, seconds)

    def _changed(self, index: int) -> Mapping[str, Tensor]:
        """A finished layer's floating weights, from what was saved."""
        return self._linears.floating(self.store, index)

    def _check_hessians(self) -> None:
        rungs = [row.damping for row in self.store.rows() if row.damping is not None]
        bad = rungs.count(LAST_RUNG)
        if bad > _MOST_BAD_HESSIANS * len(rungs):
            raise CompressError(
                f"{bad} of {len(rungs)} Hessians could not be factored at any damping: "
                "give more or other calibration text"
            )


def calibration_record(recipe: Recipe, ids_SL: Tensor) -> dict[str, object]:
    """For the manifest: where the text came from, how much of it, and its hash."""
    assert recipe.calibration is not None
    text = json.dumps(ids_SL.tolist()).encode()
    return {
        "source": recipe.calibration.source,
        "samples": len(ids_SL),
        "length": ids_SL.shape[1],
        "sha256": hashlib.sha256(text).hexdigest(),
    }
