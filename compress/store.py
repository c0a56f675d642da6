"""Finished decoder layers of a job that is not finished: what a killed run goes on from.

A folder whose name has the job's fingerprint, one safetensors file for each layer. A file
appears whole or not at all.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.manifest import LayerRow
from compress.shards import system_error

_SUFFIX = ".venturi-work"
_LAYER = "layer-"


class LayerStore:
    """``tensor`` and ``row`` find what ``save`` was given, in this process or before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}
        self._rows: dict[str, LayerRow] = {}
        self.seconds: dict[str, float] = {}

    def has(self, index: int) -> bool:
        """Whether decoder layer ``index`` is finished; it can be read then."""
        path = self._path(index)
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                rows, names = json.loads(file.metadata()["rows"]), list(file.keys())
        except (SafetensorError, ValueError, LookupError, TypeError):
            path.unlink()
            return False
        self._files |= dict.fromkeys(names, path)
        self._rows |= {row["name"]: LayerRow(**row) for row in rows}
        return True

    def save(
        self, index: int, tensors: dict[str, Tensor], rows: list[LayerRow], seconds: float
    ) -> None:
        """``seconds``: what each of the linears took. Raises ``OSError``."""
        metadata = {"rows": json.dumps([asdict(row) for row in rows])}
        self._write(self._path(index), tensors, metadata)
        self.seconds |= {row.name: seconds for row in rows}
        self.has(index)

    def save_extra(self, name: str, tensor: Tensor) -> None:
        """A tensor beside the layers. Raises ``OSError``."""
        self._write(self.folder / f"{name}.safetensors", {name: tensor}, {})

    def extra(self, name: str) -> Tensor | None:
        """What ``save_extra`` was given."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.clone()

    def modules(
        self, index: int, only: Collection[str] | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """A finished layer's tensors, by module and then by what follows its name.

        ``only``: the modules that are read; None reads all.
        """
        found: dict[str, dict[str, Tensor]] = {}
        with safe_open(self._path(index), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                module, _, suffix = name.rpartition(".")
                if only is not None and module not in only:
                    continue
                found.setdefault(module, {})[suffix] = file.get_tensor(name).clone()
        return found

    def rows(self) -> list[LayerRow]:
        """Of all finished layers."""
        return list(self._rows.values())

    def _write(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        part = path.with_suffix(".part")
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata=metadata)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.rename(path)
        except SafetensorError as error:
            raise system_error(error) from error
        finally:
            part.unlink(missing_ok=True)

    def tensor(self, name: str) -> Tensor | None:
        """A copy of a finished tensor, None where there is none of this name."""
        path = self._files.get(name)
        if path is None:
            return None
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.clone()

    def names(self, module: str) -> list[str]:
        """Names of a module's finished tensors."""
        return [name for name in self._files if name.rpartition(".")[0] == module]

    def row(self, module: str) -> LayerRow:
        """What was done to a linear."""
        return self._rows[module]

    def _path(self, index: int) -> Path:
        return self.folder / f"{_LAYER}{index:05}.safetensors"


@contextmanager
def open_store(out: Path, key: str, layers: int) -> Iterator[LayerStore]:
    """The store of the job ``key`` beside ``out``; removed where the block ends well.

    It will have ``layers`` decoder layers. What other jobs left for the same ``out`` is removed
    too. A second process waits. A note on a KeyboardInterrupt says what stays.
    """
    folder = out.with_name(f".{out.name}.{fingerprint(key)[:16]}{_SUFFIX}")
    folder.mkdir(parents=True, exist_ok=True)
    for other in out.parent.glob(f".{out.name}.*{_SUFFIX}"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        folder.mkdir(exist_ok=True)
        yield LayerStore(folder)
        shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt as interrupt:
        if not any(folder.glob("*.safetensors")):
            shutil.rmtree(folder, ignore_errors=True)
            raise
        done = len(list(folder.glob(f"{_LAYER}*.safetensors")))
        interrupt.add_note(
            f"{folder} keeps the calibration text and {done} of {layers} decoder layers: "
            "the same command goes on from there"
        )
        raise
    finally:
        os.close(descriptor)


def fingerprint(key: str) -> str:
    """Changes with anything that may change a bit: the job, torch, the processor, threads."""
    parts = (
        key,
        torch.__version__,
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        str(torch.get_num_threads()),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
