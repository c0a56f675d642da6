"""Writes safetensors shard by shard, and remembers what it wrote to compare it later."""

import hashlib
import json
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, uint8

from compress.sources import WEIGHT_INDEX


class ShardWriter:
    """Collects tensors and writes a file before they exceed ``shard_bytes``.

    A single tensor may be larger and has a file of its own. Names and index are Hugging Face's.
    ``digests`` has the sha256 of each tensor's bytes.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0
        self.digests: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes the tensor over. Raises ``OSError``."""
        if self._pending and self._pending_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes
        self.digests[name] = digest(tensor)

    def close(self) -> None:
        """Writes the rest and, for more than one shard, the index. Raises ``OSError``."""
        self._flush()
        names = ["model.safetensors"]
        if len(self._shards) > 1:
            count = len(self._shards)
            names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
            index = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": {
                    tensor: name
                    for name, tensors in zip(names, self._shards, strict=True)
                    for tensor in tensors
                },
            }
            text = json.dumps(index, indent=2, sort_keys=True)
            (self._folder / WEIGHT_INDEX).write_text(text + "\n", encoding="utf-8")
        for i, name in enumerate(names):
            # The library makes private files; the folder has what the umask grants.
            self._part(i).chmod(self._folder.stat().st_mode & 0o666)
            self._part(i).rename(self._folder / name)

    def _flush(self) -> None:
        try:
            save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        except SafetensorError as error:
            raise system_error(error) from error
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, i: int) -> Path:
        return self._folder / f"part-{i}"


def system_error(error: SafetensorError) -> OSError:
    """The system's error that the library wraps, whose number is in the text only."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]) if number else 0, str(error))


def digest(tensor: Tensor) -> str:
    """sha256 of the tensor's bytes in row-major order."""
    raw = tensor.contiguous().reshape(-1).view(uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()
