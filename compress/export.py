"""Writes an artefact of the sparse format as plain compressed-tensors, with explicit zeros."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.artefact import SHARD_BYTES
from compress.errors import CompressError, writing
from compress.progress import Progress
from compress.shards import ShardWriter
from compress.sources import CALIBRATION_NAME, MANIFEST_NAME, copied_names, model_hashes
from compress.staging import check_replaceable, publish, staging_folder
from compress.written import try_out, verify
from engine.formats import int_quantized, pack_quantized, sparse
from engine.formats.checkpoint import Checkpoint, read_json
from engine.formats.int_quantized import Int8Weight
from engine.formats.quant_config import checkpoint_format, overall_format
from engine.formats.runtime import read_runtime
from engine.models import model_spec

_MASK = ".weight_bitmask"
_REMEDY = "name another folder with --out"


def export(artefact: Path, out: Path, progress: Progress) -> None:
    """Writes ``out``, which appears whole or not at all; ``artefact`` stays.

    Raises:
        CompressError: the artefact has no sparse weights, or the disk is not as needed.
        ModelLoadError: the artefact is broken.
    """
    checkpoint = Checkpoint.open(artefact)
    checkpoint_format(checkpoint.config)
    modules = {name.removesuffix(_MASK) for name in checkpoint.tensors if name.endswith(_MASK)}
    if not modules or not (artefact / MANIFEST_NAME).is_file():
        raise CompressError(f"{artefact} is no artefact with sparse weights: use it as it is")
    out = out.resolve()
    if out == artefact.resolve():
        raise CompressError(f"{out} is the artefact itself: name another folder with --out")
    check_replaceable(out)
    with ExitStack() as stack:
        progress.phase("compressing", f"{len(modules)} layers of {artefact} get their zeros back")
        with writing(out.parent, _REMEDY):
            folder = stack.enter_context(staging_folder(out))
            shards, nbytes = ShardWriter(folder, SHARD_BYTES), Counter[str]()
            for name, tensor, module in _tensors(checkpoint, modules):
                shards.add(name, tensor)
                if module is not None:
                    nbytes[module] += tensor.nbytes
            shards.close()
            _write_files(checkpoint, folder)
        progress.phase("verifying", str(folder))
        verify(folder, shards.digests)
        try_out(folder, read_runtime(artefact).activations)
        text = json.dumps(_manifest(artefact, folder, nbytes), indent=2) + "\n"
        progress.phase("publishing", str(out))
        with writing(out.parent, _REMEDY):
            (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")
            publish(folder, out)


def _tensors(checkpoint: Checkpoint, modules: set[str]) -> Iterator[tuple[str, Tensor, str | None]]:
    """All tensors by name; those of sparse weights as their formats have them with zeros, and
    with the weight's module.
    """
    spec = model_spec(checkpoint.folder, checkpoint.config, checkpoint.tensors)
    matrices = spec.linears()
    for name in checkpoint.tensors:
        module, _, suffix = name.rpartition(".")
        if module not in modules or suffix not in sparse.SUFFIXES:
            yield name, checkpoint.tensor(name), None
            continue
        if not name.endswith(_MASK):
            continue
        names = {one: f"{module}.{one}" for one in sparse.SUFFIXES}
        found = {one: full for one, full in names.items() if full in checkpoint.tensors}
        for one, tensor in _with_zeros(
            {one: checkpoint.tensor(full) for one, full in found.items()},
            transposed=matrices[module].transposed,
        ).items():
            yield f"{module}.{one}", tensor, module


def _with_zeros(tensors: dict[str, Tensor], *, transposed: bool) -> dict[str, Tensor]:
    try:
        weight = sparse.unpack(tensors)
    except (KeyError, ValueError) as error:
        raise CompressError(f"the artefact is broken: {error}: compress the model again") from error
    if sparse.is_packed(tensors):
        return pack_quantized.pack(weight)
    assert isinstance(weight, Int8Weight)
    return int_quantized.pack(weight, transposed=transposed)


def _write_files(checkpoint: Checkpoint, folder: Path) -> None:
    config = dict(checkpoint.config)
    quantization = dict(config["quantization_config"])
    groups = {
        name: sparse.dense_group(group) for name, group in quantization["config_groups"].items()
    }
    quantization |= {"config_groups": groups, "format": overall_format(groups)}
    text = json.dumps(config | {"quantization_config": quantization}, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    copied = copied_names(checkpoint.folder)
    if (checkpoint.folder / CALIBRATION_NAME).is_file():
        copied.append(CALIBRATION_NAME)
    for name in copied:
        shutil.copyfile(checkpoint.folder / name, folder / name)


def _manifest(artefact: Path, folder: Path, nbytes: Mapping[str, int]) -> dict[str, Any]:
    """The artefact's manifest with the storage of ``folder``; ``nbytes`` by sparse module."""
    manifest = read_json(artefact / MANIFEST_NAME)
    added = 0
    for row in manifest["layers"]:
        if row["name"] in nbytes:
            size, before = nbytes[row["name"]], row["bytes"]
            row["storage"] = f"{row['storage'].partition(',')[0]}, explicit zeros"
            row |= {"bits": round(row["bits"] * size / before, 4), "bytes": size}
            added += size - before
    totals = manifest["totals"]
    bits = totals["effective_bits_per_weight"] + 8 * added / totals["compressed_parameters"]
    totals |= {"effective_bits_per_weight": round(bits, 4), "bytes": totals["bytes"] + added}
    key = hashlib.sha256(f"{manifest['key']} with explicit zeros".encode()).hexdigest()
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("[!.]*"))}
    # Nobody has judged the new folder; what the original's entropy is has not changed.
    manifest.pop("verdict", None)
    return manifest | {"key": key, "files": files, "hashes": model_hashes(folder)}
