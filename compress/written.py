"""Checks of a folder that was just written, before it is published."""

from collections.abc import Mapping
from pathlib import Path

import torch

from compress.errors import CompressError
from compress.shards import digest
from engine.blocks import Blocks
from engine.formats.checkpoint import Checkpoint


def verify(folder: Path, digests: Mapping[str, str]) -> None:
    """Re-opens ``folder``. Raises ``CompressError`` where a bit of its tensors differs."""
    written = Checkpoint.open(folder)
    if written.tensors.keys() != digests.keys():
        raise CompressError(f"{folder} does not hold the tensors written: start again")
    for name, wanted in digests.items():
        if digest(written.tensor(name)) != wanted:
            raise CompressError(f"{name} was read back with other bits: check the disk")


def try_out(folder: Path, activations: str) -> None:
    """Runs a few tokens through ``folder``'s model. Raises ``CompressError``.

    Layer by layer, with the kernels that serve; ``activations`` as in ``Runtime``.
    """
    blocks = Blocks.open(Checkpoint.open(folder), activations)
    length = min(8, blocks.spec.context_length, blocks.spec.vocabulary_size)
    hidden = blocks.embed(torch.arange(length)[None])
    for index in range(len(blocks.spec.layers)):
        hidden = blocks.run(blocks.layer(index, {}), index, hidden)
    if not bool(blocks.logits(hidden).isfinite().all()):
        raise CompressError("the compressed model gives NaN or infinite logits: not published")
