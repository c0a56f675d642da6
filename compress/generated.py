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
from engine.types import Request, SamplingParams, StoppingParams

_SEQUENCES = 64
_BLOCK_SIZE = 16
_ONE_THREAD_BYTES = 64 << 20


def threads(weight_bytes: int) -> int:
    """One for a small model, whose products are too short to be shared; else torch's own."""
    return 1 if weight_bytes < _ONE_THREAD_BYTES else min(torch.get_num_threads(), _cores())


def generate(model_dir: Path, *, samples: int, length: int, seed: int) -> Tensor:
    """Ids [S, L] from the original model, which is in memory as a whole for that.

    Each sample begins with the bos token, or with a random one where the model has none, and
    runs on after an end token. Raises ``CompressError`` or ``ModelLoadError``.
    """
    blocks = _SEQUENCES * -(-length // _BLOCK_SIZE)
    core = EngineCore.from_config(
        EngineConfig(
            model_dir=model_dir,
            cache=CacheConfig(dtype="fp32", block_size=_BLOCK_SIZE, blocks=blocks),
            scheduler=SchedulerConfig(max_sequences=_SEQUENCES),
            kernels=KernelConfig(threads=torch.get_num_threads()),
        )
    )
    vocabulary, draw = core.report().vocabulary_size, random.Random(seed)
    rows = [bos_ids(model_dir) or [draw.randrange(vocabulary)] for _ in range(samples)]
    for index, prompt in enumerate(rows):
        core.submit(_request(index, prompt, length, draw.getrandbits(32)))
    while core.has_work:
        output = core.step()
        for event in output.tokens:
            rows[int(event.id)] = [*rows[int(event.id)], event.token]
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


def _cores() -> int:
    return os.cpu_count() or 1
