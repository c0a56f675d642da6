"""Writes an artefact's files into a folder: read, compress and write, tensor by tensor.

Walks the checkpoint and knows no mathematics; the methods do that. At most one shard and
one tensor are in memory.
"""

import json
import math
import platform
import shutil
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from compress.errors import CompressError
from compress.job import Job
from compress.manifest import LayerRow, Manifest, recipe_record
from compress.memory import PeakMemory
from compress.methods.rtn import Rtn
from compress.methods.scheme import Scheme
from compress.plan import Plan
from compress.progress import Progress
from compress.shards import ShardWriter, digest
from compress.sources import copied_names
from engine.formats import int_quantized
from engine.formats.checkpoint import Checkpoint
from engine.formats.runtime import Runtime, to_json

# Of output held in memory at most, but for a single larger tensor.
SHARD_BYTES = 512 << 20
_STORAGE = "int-quantized 8 bit per channel"
_EXECUTION = "int8 x int8"
_LOADED_INT8 = "int8 x int8, quantised when loaded"
_FLOAT = "float"


class ArtefactWriter:
    """One job's output in ``folder``: call write_weights, write_files, verify, manifest."""

    def __init__(self, job: Job, checkpoint: Checkpoint, plan: Plan, folder: Path) -> None:
        self._job = job
        self._checkpoint = checkpoint
        self._plan = plan
        self._folder = folder
        self._shards = ShardWriter(folder, SHARD_BYTES)
        self._rows: dict[str, LayerRow] = {}
        self._seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def write_weights(self, progress: Progress) -> None:
        """Compresses the planned layers and copies every other tensor, layer by layer."""
        items = len(self._plan.modifiers)
        total = sum(self._checkpoint.info(name).nbytes for name in self._plan.order)
        done = 0
        for tensor_name in self._plan.order:
            tensor = self._read(tensor_name)
            done += tensor.nbytes
            name = tensor_name.removesuffix(".weight")
            if name == tensor_name or name not in self._plan.modifiers:
                self._shards.add(tensor_name, tensor)
                continue
            self._compress(name, tensor)
            elapsed = time.perf_counter() - self._start
            progress.layer(len(self._rows), items, name, elapsed * (total - done) / done)
        self._shards.close()

    def write_files(self) -> None:
        """config.json with the quantization_config, and copies of the other small files."""
        config = self._checkpoint.config | {"quantization_config": self._plan.quantization_config}
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (self._folder / "config.json").write_text(text + "\n", encoding="utf-8")
        for name in copied_names(self._checkpoint.folder):
            shutil.copyfile(self._checkpoint.folder / name, self._folder / name)

    def verify(self) -> None:
        """Re-opens what was written. Raises ``CompressError`` where a bit differs."""
        written = Checkpoint.open(self._folder)
        if written.tensors.keys() != self._shards.digests.keys():
            raise CompressError(f"{self._folder} does not hold the tensors written: start again")
        for name, wanted in self._shards.digests.items():
            if digest(written.tensor(name)) != wanted:
                raise CompressError(f"{name} was read back with other bits: check the disk")

    def manifest(self, memory: PeakMemory) -> Manifest:
        """What was done; ``memory`` is the measurement of this run."""
        recipe = self._job.recipe
        runtime = Runtime(head=recipe.head, kv_dtype=recipe.kv_cache.dtype, activations="int8")
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
            runtime=to_json(runtime),
            files={path.name: path.stat().st_size for path in sorted(self._folder.glob("[!.]*"))},
            measured={
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.perf_counter() - self._start, 3),
                "layer_seconds": self._seconds,
                "peak_rss_anon_bytes": memory.peak,
                "baseline_rss_anon_bytes": memory.baseline,
            },
        )

    def _read(self, name: str) -> Tensor:
        try:
            tensor = self._checkpoint.tensor(name)
        except SafetensorError as error:
            file = self._checkpoint.info(name).file
            raise CompressError(f"{file} cannot be read: {error}: copy it anew") from error
        if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel():
            low, high = tensor.aminmax()
            if not (low.isfinite() and high.isfinite()):
                raise CompressError(
                    f"{self._checkpoint.folder}: {name} has NaN or infinite values: "
                    "the checkpoint is damaged"
                )
        return tensor

    def _compress(self, name: str, weight_NK: Tensor) -> None:
        method, transposed = self._plan.modifiers[name].type, name in self._plan.transposed
        if transposed:
            weight_NK = weight_NK.t().contiguous()
        begin = time.perf_counter()
        result = Rtn(Scheme()).quantise(weight_NK)
        assert isinstance(result.weight, int_quantized.Int8Weight)
        nbytes = result.weight.q_NK.nbytes + result.weight.scale_N.nbytes
        for suffix, tensor in int_quantized.pack(result.weight, transposed=transposed).items():
            self._shards.add(f"{name}.{suffix}", tensor)
        self._seconds[name] = round(time.perf_counter() - begin, 6)
        self._rows[name] = LayerRow(
            name=name,
            storage=_STORAGE,
            execution=_EXECUTION,
            method=method,
            bits=round(8 * nbytes / weight_NK.numel(), 4),
            bytes=nbytes,
            # The last digits of a sum depend on the number of threads.
            relative_error=float(f"{result.relative_error:.6g}"),
            clipped_share=float(f"{result.clipped_share:.6g}"),
        )

    def _kept_rows(self) -> list[LayerRow]:
        """The linears that stay as they are, and the head."""
        rows = [self._kept_row(name, f"{name}.weight", _FLOAT) for name in self._plan.kept]
        execution = _LOADED_INT8 if self._job.recipe.head == "int8" else _FLOAT
        head = self._kept_row(self._plan.head, f"{self._plan.head_weight}.weight", execution)
        return [*rows, head]

    def _kept_row(self, name: str, tensor: str, execution: str) -> LayerRow:
        info = self._checkpoint.info(tensor)
        storage = info.dtype.lower()
        if tensor != f"{name}.weight":
            storage += f", tied to {tensor.removesuffix('.weight')}"
        bits = 8 * info.nbytes / max(1, math.prod(info.shape))
        return LayerRow(
            name=name, storage=storage, execution=execution, method="none", bits=bits,
            bytes=info.nbytes,
        )  # fmt: skip

    def _totals(self) -> dict[str, float]:
        infos = self._checkpoint.tensors
        compressed = [infos[f"{name}.weight"] for name in self._rows]
        weights = sum(math.prod(info.shape) for info in compressed)
        nbytes = sum(row.bytes for row in self._rows.values())
        return {
            "parameters": sum(math.prod(info.shape) for info in infos.values()),
            "compressed_parameters": weights,
            "effective_bits_per_weight": round(8 * nbytes / weights, 4),
            "bytes": self._shards.total_bytes,
            "original_bytes": sum(info.nbytes for info in infos.values()),
        }
