"""The kernel table: (operation, backend) -> function, imported when it is asked for.

``reference`` says what each operation computes; the start-up self-test and the parity tests
compare the backends with it. Nothing falls back silently: a backend that lacks an operation
is an error here.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from engine.errors import ModelLoadError

TABLE = {
    ("int8_linear", "reference"): "engine.kernels.reference",
    ("int8_linear", "torch"): "engine.kernels.torch_native",
    ("int4_linear", "reference"): "engine.kernels.reference",
    ("int4_linear", "torch"): "engine.kernels.torch_native",
    ("dense_linear", "reference"): "engine.kernels.reference",
    ("dense_linear", "torch"): "engine.kernels.torch_native",
    ("rms_norm", "reference"): "engine.kernels.reference",
    ("rms_norm", "torch"): "engine.kernels.torch_native",
    ("layer_norm", "reference"): "engine.kernels.reference",
    ("layer_norm", "torch"): "engine.kernels.torch_native",
    ("attention", "torch"): "engine.kernels.torch_native",
}
BACKENDS = ("torch",)


def kernel(operation: str, backend: str) -> Callable[..., Any]:
    """The function for ``operation``. Raises ``ModelLoadError`` where there is none."""
    module = TABLE.get((operation, backend))
    if module is None:
        raise ModelLoadError(f"backend {backend!r} has no kernel for {operation}")
    function: Callable[..., Any] = getattr(import_module(module), operation)
    return function
