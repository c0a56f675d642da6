"""Loads the native library and chooses the instruction set.

``VENTURI_CPU_ISA`` (avx512, avx2 or portable) overrides the choice. The library brings no
OpenMP runtime: its symbols resolve to those of the runtime that torch has loaded for all, so
that the threads of both are the same ones. Where torch has none, loading fails, and says so.
"""

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

# Loads the OpenMP runtime; the library's symbols resolve to it.
import torch  # noqa: F401
from torch import Tensor

from engine.errors import ModelLoadError
from engine.kernels.cpu import build

# Best last; the order of the bits of venturi_instruction_sets.
INSTRUCTION_SETS = ("portable", "avx2", "avx512")
_VARIABLE = "VENTURI_CPU_ISA"

# A native entry point: takes the address of one structure, and releases the GIL.
Entry = Callable[[object], None]


@dataclass(frozen=True, slots=True)
class Kernels:
    """The library's functions for one instruction set."""

    instruction_set: str
    library: ctypes.CDLL
    linear_int8: Entry = field(init=False, compare=False)
    keep: Entry = field(init=False, compare=False)
    expand: Entry = field(init=False, compare=False)
    linear_int4: Entry = field(init=False, compare=False)
    linear_float: Entry = field(init=False, compare=False)
    norm: Entry = field(init=False, compare=False)
    activate: Entry = field(init=False, compare=False)
    layer: Entry = field(init=False, compare=False)
    layer_scratch: Entry = field(init=False, compare=False)
    kv_step: Entry = field(init=False, compare=False)
    attention: Entry = field(init=False, compare=False)
    attention_scratch: Entry = field(init=False, compare=False)
    sample: Entry = field(init=False, compare=False)
    logprobs: Entry = field(init=False, compare=False)
    penalise: Entry = field(init=False, compare=False)

    def __post_init__(self) -> None:
        for one in fields(self):
            if not one.init:
                object.__setattr__(self, one.name, self.entry(one.name))

    @property
    def name(self) -> str:
        """For reports."""
        return f"venturi-{self.instruction_set}"

    def entry(self, name: str) -> Entry:
        """The function ``venturi_<name>``, called as ``entry(ctypes.byref(structure))``."""
        function: Entry = self.library[f"venturi_{name}_{self.instruction_set}"]
        function.argtypes = [ctypes.c_void_p]  # type: ignore[attr-defined]
        function.restype = None  # type: ignore[attr-defined]
        return function


@functools.cache
def kernels(instruction_set: str | None = None) -> Kernels:
    """Those of ``instruction_set``; None asks the environment, then takes the machine's best.

    Raises ``ModelLoadError`` where the library cannot be loaded, or the set is unknown or not
    supported by this machine.
    """
    library = load()
    wanted = instruction_set or asked()
    if not wanted:
        return Kernels(supported()[-1], library)
    if wanted not in INSTRUCTION_SETS:
        known = ", ".join(INSTRUCTION_SETS)
        raise ModelLoadError(f"{_VARIABLE}: {wanted!r} is unknown; known: {known}")
    if wanted not in supported():
        raise ModelLoadError(f"{_VARIABLE}: this machine does not support {wanted}")
    return Kernels(wanted, library)


def asked() -> str:
    """The instruction set that the environment asks for, or nothing."""
    return os.environ.get(_VARIABLE, "")


def supported() -> tuple[str, ...]:
    """The instruction sets that this machine can run, the best one last."""
    bits = load().venturi_instruction_sets()
    return tuple(name for bit, name in enumerate(INSTRUCTION_SETS) if bits >> bit & 1)


def expands() -> bool:
    """Whether this processor can put zeros back in one instruction (AVX512-VBMI2)."""
    return bool(load().venturi_expands())


def address(tensor: Tensor) -> int:
    """Of a tensor's first element. The tensor must be contiguous, and outlive the address."""
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return tensor.data_ptr()


@functools.cache
def load(path: Path = build.LIBRARY) -> ctypes.CDLL:
    """The library. Raises ``ModelLoadError`` where it is missing, stale or does not fit torch."""
    remedy = f"{sys.executable} -m engine.kernels.cpu.build"
    if not path.exists():
        raise ModelLoadError(f"the native CPU kernels are not built; `{remedy}` builds them")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        # An undefined GOMP_parallel: torch was built without OpenMP, or with another kind.
        raise ModelLoadError(f"the native CPU kernels cannot be loaded: {error}") from error
    library.venturi_source_hash.restype = ctypes.c_char_p
    # Structures are passed by their layout, so that an older library would read the wrong bytes.
    if library.venturi_source_hash() != build.source_hash().encode():
        raise ModelLoadError(f"the native CPU kernels are older than their sources; run `{remedy}`")
    return library
