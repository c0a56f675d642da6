"""Offline compression of a model folder: recipe, methods, pipeline, cache, evaluation.

``compress.compress`` is the whole job in one call. Importing this package imports no torch,
so that a cache hit and a command line's help stay quick.
"""

from typing import TYPE_CHECKING

from compress.errors import CompressError

if TYPE_CHECKING:
    from compress.pipeline import compress as compress

__all__ = ["CompressError", "compress"]


def __getattr__(name: str) -> object:
    if name == "compress":
        from compress.pipeline import compress

        return compress
    raise AttributeError(f"module 'compress' has no attribute {name!r}")
