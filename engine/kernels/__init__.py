"""The kernel table: (operation, backend) -> function, imported when it is asked for.

``reference`` says what each operation computes; the start-up self-test and the parity tests
compare the backends with it. Nothing falls back silently: a backend that lacks an operation
is an error here.
"""

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

from engine.errors import ModelLoadError

logger = logging.getLogger(__name__)

# Backend "cpu" is native; what it has no kernel for is torch's, and named so here.
TABLE = {
    ("int8_linear", "reference"): "engine.kernels.reference",
    ("int8_linear", "torch"): "engine.kernels.torch_native",
    ("int4_linear", "reference"): "engine.kernels.reference",
    ("int4_linear", "torch"): "engine.kernels.torch_native",
    ("float8_linear", "reference"): "engine.kernels.reference",
    ("float8_linear", "torch"): "engine.kernels.reference",  # exact, and slow
    ("float8_linear", "cpu"): "engine.kernels.reference",
    ("dense_linear", "reference"): "engine.kernels.reference",
    ("dense_linear", "torch"): "engine.kernels.torch_native",
    ("rms_norm", "reference"): "engine.kernels.reference",
    ("rms_norm", "torch"): "engine.kernels.torch_native",
    ("layer_norm", "reference"): "engine.kernels.reference",
    ("layer_norm", "torch"): "engine.kernels.torch_native",
    ("activation", "reference"): "engine.kernels.reference",
    ("activation", "torch"): "engine.kernels.torch_native",
    ("activation", "cpu"): "engine.kernels.cpu.norm",
    ("int8_linear", "cpu"): "engine.kernels.cpu.linear",
    ("int4_linear", "cpu"): "engine.kernels.torch_native",  # of groups that ours do not take
    ("dense_linear", "cpu"): "engine.kernels.torch_native",
    ("rms_norm", "cpu"): "engine.kernels.cpu.norm",
    ("layer_norm", "cpu"): "engine.kernels.cpu.norm",
    ("sample", "reference"): "engine.kernels.reference",
    ("sample", "torch"): "engine.kernels.torch_sampling",
    ("sample", "cpu"): "engine.kernels.cpu.sample",
    ("logprobs", "torch"): "engine.kernels.torch_sampling",
    ("logprobs", "cpu"): "engine.kernels.cpu.sample",
    ("penalise", "torch"): "engine.penalties",
    ("penalise", "cpu"): "engine.kernels.cpu.penalise",
}
BACKENDS = ("torch", "cpu")


def resolve(backend: str) -> str:
    """The backend that ``backend`` means here: ``auto`` is cpu where its library loads, and has
    kernels for this machine's vectors or those that ``VENTURI_CPU_ISA`` names.

    Raises ``ModelLoadError`` where it is unknown, or is ``cpu`` and cannot be loaded.
    """
    if backend not in ("auto", *BACKENDS):
        known = ", ".join(("auto", *BACKENDS))
        raise ModelLoadError(f"kernel backend {backend!r} is unknown; known: {known}")
    if backend == "torch":
        return backend
    library = import_module("engine.kernels.cpu.library")
    try:
        library.load()
    except ModelLoadError as error:
        if backend == "cpu":
            raise
        logger.warning("serving with torch's kernels, which are slower: %s", error)
        return "torch"
    found = library.kernels()  # what VENTURI_CPU_ISA asks for must be there
    if backend == "auto" and found.instruction_set == "portable" and not library.asked():
        logger.warning("serving with torch's kernels: the portable ones, all that fit, are slower")
        return "torch"
    return "cpu"


def kernel(operation: str, backend: str) -> Callable[..., Any]:
    """The function for ``operation``. Raises ``ModelLoadError`` where there is none."""
    module = TABLE.get((operation, backend))
    if module is None:
        raise ModelLoadError(f"backend {backend!r} has no kernel for {operation}")
    function: Callable[..., Any] = getattr(import_module(module), operation)
    return function
