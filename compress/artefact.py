"""Writes an artefact's files into a folder: read, compress and write, tensor by tensor.

Walks the checkpoint and knows no mathematics; the methods do that. At most one shard and
one tensor are in memory.
"""

import json
import math
import platform
import shutil
import time
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from compress.block import LinearResult
from compress.errors import CompressError
from compress.job import Job
from compress.layer_row import pack_linear
from compress.manifest import LayerRow, Manifest, recipe_record
from compress.memory import PeakMemory
from compress.plan import Plan
from compress.progress import Progress
from compress.recipe import Recipe
from compress.shards import ShardWriter
from compress.sources import copied_names, model_hashes
from compress.steps import linear_steps
from compress.store import LayerStore
from compress.written import try_out, verify
from engine.formats.checkpoint import Checkpoint
from engine.formats.runtime import Runtime, to_json

# Of output held in memory at most, but for a single larger tensor.
SHARD_BYTES = 512 << 20
_LOADED_INT8 = "int8 x int8, quantised when loaded"
_FLOAT = "float"


class ArtefactWriter:
    """One job's output in ``folder``: call write_weights, write_files, verify, manifest."""

    def __init__(
        self, job: Job, checkpoint: Checkpoint, plan: Plan, folder: Path, store: LayerStore | None
    ) -> None:
        """``store`` has the layers of a calibrated job; without, they are rounded here."""
        self._store = store
        self._job = job
        self._checkpoint = checkpoint
        self._plan = plan
        self._folder = folder
        self._shards = ShardWriter(folder, SHARD_BYTES)
        self._rows: dict[str, LayerRow] = {}
        self._seconds: dict[str, float] = {}
        self._start = time.perf_counter()
        self.calibration: dict[str, object] | None = None

    def write_weights(self, progress: Progress) -> None:
        """Compresses the planned layers and copies every other tensor, layer by layer."""
        items = len(self._plan.treatments)
        total = sum(self._checkpoint.info(name).nbytes for name in self._plan.order)
        done = 0
        for tensor_name in self._plan.order:
            done += self._checkpoint.info(tensor_name).nbytes
            if self._store is not None and self._take(tensor_name, self._store):
                continue
            tensor = self._read(tensor_name)
            name = tensor_name.removesuffix(".weight")
            if name == tensor_name or name not in self._plan.treatments:
                self._shards.add(tensor_name, tensor)
                continue
            self._compress(name, tensor)
            elapsed = time.perf_counter() - self._start
            progress.layer(len(self._rows), items, name, elapsed * (total - done) / done)
        self._shards.close()

    def write_files(self) -> None:
        """config.json with the quantization_config, and copies of the other small files."""
        config = dict(self._checkpoint.config)
        if self._plan.quantization_config is not None:
            config["quantization_config"] = self._plan.quantization_config
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (self._folder / "config.json").write_text(text + "\n", encoding="utf-8")
        for name in copied_names(self._checkpoint.folder):
            shutil.copyfile(self._checkpoint.folder / name, self._folder / name)

    def verify(self) -> None:
        """Re-opens what was written, and runs it. Raises ``CompressError``."""
        verify(self._folder, self._shards.digests)
        try_out(self._folder, self._job.recipe.activations)

    def manifest(self, memory: PeakMemory) -> Manifest:
        """What was done; ``memory`` is the measurement of this run."""
        recipe = self._job.recipe
        runtime = make_runtime(recipe)
        return Manifest(
            key=self._job.key,
            recipe=recipe_record(self._job),
            sources=self._job.sources.hashes,
            versions={
                "venturi": version("venturi-server"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            layers=(*self._rows.values(), *self._kept_rows()),
            totals=self._totals(),
            summary=self._summary(),
            calibration=self.calibration,
            runtime=to_json(runtime),
            files={path.name: path.stat().st_size for path in sorted(self._folder.glob("[!.]*"))},
            hashes=model_hashes(self._folder),
            measured={
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.perf_counter() - self._start, 3),
                "layer_seconds": self._seconds,
                "peak_rss_anon_bytes": memory.peak,
                "baseline_rss_anon_bytes": memory.baseline,
            },
        )

    def _read(self, name: str) -> Tensor:
        tensor = self._checkpoint.tensor(name)
        if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel():
            low, high = tensor.aminmax()
            if not (low.isfinite() and high.isfinite()):
                raise CompressError(
                    f"{self._checkpoint.folder}: {name} has NaN or infinite values: "
                    "the checkpoint is damaged"
                )
        return tensor

    def _take(self, tensor_name: str, store: LayerStore) -> bool:
        """Adds what the calibrated run made of a tensor; False: it is as it was."""
        name = tensor_name.removesuffix(".weight")
        if name in self._plan.treatments and name != tensor_name:
            for full_name in store.names(name):
                self._add_stored(full_name, store)
            self._rows[name] = store.row(name)
            self._seconds[name] = round(store.seconds.get(name, 0.0), 6)
            return True
        return self._add_stored(tensor_name, store)

    def _add_stored(self, full_name: str, store: LayerStore) -> bool:
        tensor = store.tensor(full_name)
        if tensor is None:
            return False
        self._shards.add(full_name, tensor)
        return True

    def _compress(self, name: str, weight_NK: Tensor) -> None:
        treatment, transposed = self._plan.treatments[name], name in self._plan.transposed
        if transposed:
            weight_NK = weight_NK.t().contiguous()
        begin = time.perf_counter()
        quantiser = linear_steps(treatment, weight_NK.dtype).quantiser
        assert quantiser is not None
        result = quantiser.quantise(weight_NK, None)
        tensors, row = pack_linear(
            name,
            treatment,
            LinearResult(
                weight=result.weight,
                outcomes=(result.outcome,),
                relative_error=result.relative_error,
                clipped_share=result.clipped_share,
                sparsity=0.0,
            ),
            transposed=transposed,
            dtype=weight_NK.dtype,
        )
        for full_name, tensor in tensors.items():
            self._shards.add(full_name, tensor)
        self._seconds[name] = round(time.perf_counter() - begin, 6)
        self._rows[name] = row

    def _summary(self) -> dict[str, dict[str, int]]:
        rows = self._rows.values()
        kept = Counter(row.kept for row in rows if row.kept is not None)
        damping = Counter(row.damping for row in rows if row.damping is not None)
        return {"kept": dict(kept), "damping": dict(damping)}

    def _kept_rows(self) -> list[LayerRow]:
        """The linears that stay as they are, and the head."""
        kept = "no modifier of the recipe is for it"
        rows = [self._kept_row(name, f"{name}.weight", _FLOAT, kept) for name in self._plan.kept]
        execution = _LOADED_INT8 if self._job.recipe.head == "int8" else _FLOAT
        note = "the head" if self._job.recipe.head == "keep" else "the head: 8 bits when loaded"
        head = self._kept_row(self._plan.head, f"{self._plan.head_weight}.weight", execution, note)
        return [*rows, head]

    def _kept_row(self, name: str, tensor: str, execution: str, note: str) -> LayerRow:
        info = self._checkpoint.info(tensor)
        storage = info.dtype.lower()
        if tensor != f"{name}.weight":
            storage += f", tied to {tensor.removesuffix('.weight')}"
        bits = 8 * info.nbytes / max(1, math.prod(info.shape))
        return LayerRow(
            name=name, storage=storage, execution=execution, method="none", bits=bits,
            bytes=info.nbytes, note=note,
        )  # fmt: skip

    def _totals(self) -> dict[str, float]:
        infos = self._checkpoint.tensors
        compressed = {name: math.prod(infos[f"{name}.weight"].shape) for name in self._rows}
        weights = sum(compressed.values())
        nbytes = sum(row.bytes for row in self._rows.values())
        zeros = sum(compressed[row.name] * (row.sparsity or 0.0) for row in self._rows.values())
        return {
            "parameters": sum(math.prod(info.shape) for info in infos.values()),
            "compressed_parameters": weights,
            "effective_bits_per_weight": round(8 * nbytes / weights, 4),
            "sparsity": round(zeros / weights, 6),
            "bytes": self._shards.total_bytes,
            "original_bytes": sum(info.nbytes for info in infos.values()),
        }


def make_runtime(recipe: Recipe) -> Runtime:
    """What the artefact asks of the engine."""
    return Runtime(head=recipe.head, kv_dtype=recipe.kv_cache.dtype, activations=recipe.activations)
