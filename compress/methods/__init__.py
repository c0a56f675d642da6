"""The registry of compression methods. Importing it imports no torch.

To add a method: its file, its line in ``METHODS``, its row in the tests.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from compress.methods.base import Method

PLANNED_METHODS = ("gptq", "awq", "smoothquant", "sparsegpt", "wanda", "magnitude", "distill")


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """Where a method is, and the version of its arithmetic: raised whenever bits change."""

    module: str
    class_name: str
    version: int


METHODS = {"rtn": MethodEntry("compress.methods.rtn", "Rtn", version=1)}


def load_method(name: str) -> "Method":
    """An instance of the method ``name``, which must be a key of ``METHODS``."""
    entry = METHODS[name]
    return cast("Method", getattr(import_module(entry.module), entry.class_name)())
