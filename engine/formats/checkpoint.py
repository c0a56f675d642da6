"""Reads a Hugging Face folder: config.json and safetensors, single or sharded.

Everything that can be wrong with the files is found before a tensor is allocated, and is
a ``ModelLoadError`` of one line.
"""

import json
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import ModelLoadError
from engine.formats import QUANTIZATION_FILES

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_HEADER_BYTES = 100 << 20
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}
_ITEM_BYTES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and what it is; ``dtype`` is safetensors' name for it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened folder. Tensors are read one at a time; nothing stays in memory.

    ``config`` is config.json; ``quantization_config`` has what a file of its own says too.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Reads and validates config.json and all safetensors headers of ``folder``."""
        if not folder.is_dir():
            raise ModelLoadError(f"{folder} is not a folder: name a Hugging Face model folder")
        config = _with_own_file(folder, read_json(folder / "config.json"))
        tensors: dict[str, TensorInfo] = {}
        for file in _weight_files(folder):
            tensors |= read_header(file)
        return cls(folder, config, tensors)

    def info(self, name: str) -> TensorInfo:
        """Raises ``ModelLoadError`` where the checkpoint has no such tensor."""
        try:
            return self.tensors[name]
        except KeyError:
            raise ModelLoadError(
                f"{self.folder}: the weights have no tensor {name}; "
                "config.json and the safetensors files do not belong together"
            ) from None

    def tensor(self, name: str) -> torch.Tensor:
        """A copy of the tensor, so that the file's pages can be dropped.

        Raises ``ModelLoadError`` where the file is no longer what was opened.
        """
        with self._mapped(name) as tensor:
            return tensor.clone()

    def rows(self, name: str, rows: torch.Tensor | slice) -> torch.Tensor:
        """A copy of some rows of the tensor; the others are not read. Raises as ``tensor``."""
        with self._mapped(name) as tensor:
            return tensor[rows].clone()

    @contextmanager
    def _mapped(self, name: str) -> Iterator[torch.Tensor]:
        path = self.info(name).file
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                yield file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{path} cannot be read: {error}: copy it anew") from error

    def shaped(self, name: str, *shape: int) -> torch.Tensor:
        """As ``tensor``; raises ``ModelLoadError`` unless it has this shape."""
        found = self.info(name).shape
        if found != shape:
            raise ModelLoadError(
                f"{self.folder}/config.json asks for {name} of shape {list(shape)}, "
                f"the weights have {list(found)}"
            )
        return self.tensor(name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ``ModelLoadError`` where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(f"{path} is missing: is this a Hugging Face model folder?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object")
    return value


def _with_own_file(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What older GPTQ and AWQ checkpoints keep beside config.json, which has the last word."""
    said = config.get("quantization_config")
    for method, name in QUANTIZATION_FILES.items():
        served = said is None or (isinstance(said, dict) and said.get("quant_method") == method)
        if served and (folder / name).exists():
            own = {"quant_method": method, **read_json(folder / name)}
            return {**config, "quantization_config": {**own, **(said or {})}}
    return config


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX_NAME).exists():
        weight_map = read_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelLoadError(f"{folder / INDEX_NAME} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        if outside := [name for name in names if Path(name).name != name]:
            raise ModelLoadError(f"{folder / INDEX_NAME} names a file outside it: {outside[0]}")
        return [folder / name for name in names]
    if (folder / SINGLE_NAME).exists():
        return [folder / SINGLE_NAME]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.gguf")):
        raise ModelLoadError(
            f"{folder} has no safetensors weights; .bin, .pt and .gguf files are not read: "
            "convert them with transformers' save_pretrained"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    remedy = f": rename {others[0]}" if len(others) == 1 else ""
    raise ModelLoadError(f"{folder} has no {SINGLE_NAME} and no {INDEX_NAME}{remedy}")


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Name -> info of a safetensors file, checked against the file's size.

    Format: 8 bytes little-endian header length, JSON header, data
    (https://github.com/huggingface/safetensors#format).
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise ModelLoadError(f"{file} is truncated or not a safetensors file: copy it anew")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise ModelLoadError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{file} has a broken safetensors header: copy it anew") from error
    return _check_entries(file, header, size - 8 - length)


def _check_entries(file: Path, header: Any, data_bytes: int) -> dict[str, TensorInfo]:
    """The tensors must fill the data without holes and overlaps, as the format demands."""
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    try:
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = (_integer(offset) for offset in entry["data_offsets"])
                shape = tuple(_integer(n) for n in entry["shape"])
                nbytes = math.prod(shape) * _ITEM_BYTES[entry["dtype"]]
                if end - begin != nbytes:
                    raise ValueError(name)
                tensors[name] = TensorInfo(file, entry["dtype"], shape, nbytes)
                spans.append((begin, end, name))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(f"{file} has a broken safetensors header: copy it anew") from error
    at = 0
    for begin, end, name in sorted(spans):
        if end > data_bytes:
            raise ModelLoadError(f"{file} is truncated: {name} ends after the file's end")
        if begin != at:
            raise ModelLoadError(f"{file} is broken: {name} does not follow the tensor before it")
        at = end
    if at != data_bytes:
        raise ModelLoadError(f"{file} is broken: bytes follow its last tensor")
    return tensors


def _integer(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value
