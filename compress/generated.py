"""Calibration text that the model writes itself: temperature 1, seeded."""

import os
import random
from pathlib import Path

import torch
from torch import Tensor

from compress.documents import bos_ids
from compress.errors import CompressError
from engine.config import CacheConfig, EngineConfig, KernelConfig, SchedulerConfig
from engine.core import EngineCore
from engine.formats.checkpoint import Checkpoint
from engine.models import model_spec
from engine.models.spec import ModelSpec
from engine.types import Request, SamplingParams, StoppingParams

_BLOCK_SIZE = 16
# Sequences that are written at once, as their keys and values allow.
_MOST_SEQUENCES = 128
_KV_BYTES = 256 << 20
# No step's composition may depend on how long the one before took: the same text every time.
_ANY_GAP_S = 3600.0
_ONE_THREAD_BYTES = 64 << 20


def threads(weight_bytes: int) -> int:
    """One for a small model, whose products are too short to be shared; else torch's own."""
    return 1 if weight_bytes < _ONE_THREAD_BYTES else min(torch.get_num_threads(), _cores())


def sequence_bytes(spec: ModelSpec, length: int) -> int:
    """Int8 keys and values of a sequence, with their scales."""
    vectors = 2 * len(spec.layers) * spec.layer.kv_heads * _blocks(length) * _BLOCK_SIZE
    return vectors * (spec.layer.head_dim + 4)


def sequences_at_once(spec: ModelSpec, length: int) -> int:
    """How many samples are written in a batch."""
    return max(1, min(_MOST_SEQUENCES, _KV_BYTES // sequence_bytes(spec, length)))


def generate(
    model_dir: Path, *, samples: int, length: int, seed: int, int8_weights: bool = False
) -> Tensor:
    """Ids [S, L] from the original model, which is in memory as a whole for that.

    Each sample begins with the bos token, or with a random one where the model has none, and
    runs on after an end token. ``int8_weights`` is that of ``KernelConfig``. Raises
    ``CompressError`` or ``ModelLoadError``.
    """
    checkpoint = Checkpoint.open(model_dir)
    spec = model_spec(model_dir, checkpoint.config, checkpoint.tensors)
    at_once = min(samples, sequences_at_once(spec, length))
    core = EngineCore.from_config(
        EngineConfig(
            model_dir=model_dir,
            cache=CacheConfig(
                dtype="int8", block_size=_BLOCK_SIZE, blocks=at_once * _blocks(length)
            ),
            scheduler=SchedulerConfig(
                max_sequences=at_once, max_gap_s=_ANY_GAP_S, speculative_tokens=0
            ),
            kernels=KernelConfig(threads=torch.get_num_threads(), int8_weights=int8_weights),
        )
    )
    draw = random.Random(seed)
    rows = [bos_ids(model_dir) or [draw.randrange(spec.vocabulary_size)] for _ in range(samples)]
    for index, prompt in enumerate(rows):
        core.submit(_request(index, prompt, length, draw.getrandbits(32)))
    rows = [list(prompt) for prompt in rows]
    while core.has_work:
        output = core.step()
        for event in output.tokens:
            rows[int(event.id)].append(event.token)
        if failed := [end for end in output.finished if end.message]:
            raise CompressError(f"the model could not generate text: {failed[0].message}")
    return torch.tensor([row[:length] for row in rows])


def _request(index: int, prompt: list[int], length: int, seed: int) -> Request:
    return Request(
        id=str(index),
        prompt=list(prompt),
        sampling=SamplingParams(temperature=1.0, seed=seed),
        stopping=StoppingParams(max_tokens=length - len(prompt)),
        arrival=0.0,
        cache_salt=str(index),
    )


def _blocks(length: int) -> int:
    return -(-length // _BLOCK_SIZE)


def _cores() -> int:
    return os.cpu_count() or 1
