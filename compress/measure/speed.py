"""Speed of generating, original and artefact in turn, through the engine's own steps."""

import random
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from compress.generated import threads
from compress.measure.figures import Speed
from compress.progress import Progress
from engine.config import CacheConfig, EngineConfig, KernelConfig, SchedulerConfig
from engine.core import EngineCore
from engine.types import ModelReport, Request, SamplingParams, StoppingParams

BATCHES = (1, 8, 32)
# Fewer tokens where the context is shorter: a third of it is the prompt.
_PROMPT, _TOKENS, _REPEATS = 16, 32, 3
_BLOCK_SIZE = 16


def measure_speed(
    original: Path, artefact: Path, kv_dtype: str, progress: Progress
) -> tuple[Speed, ...]:
    """Medians at each batch size, without speculation; raises ``ModelLoadError``.

    Original and artefact take turns, so that what else the machine does meets both.
    """
    progress.phase("evaluating", "speed of generating")
    count = threads(sum(file.stat().st_size for file in original.glob("*.safetensors")))
    pair = [_core(original, "fp32", count), _core(artefact, kv_dtype, count)]
    found, start = [], time.perf_counter()
    for done, batch in enumerate(BATCHES, start=1):
        runs = [[_tokens_per_second(core, batch) for core in pair] for _ in range(_REPEATS)]
        before, after = (round(statistics.median(side), 1) for side in zip(*runs, strict=True))
        memory = [_bytes(core.report(), batch) for core in pair]
        found.append(
            Speed(
                batch=batch, original=before, artefact=after,
                original_bytes=memory[0], artefact_bytes=memory[1],
            )
        )  # fmt: skip
        # A step of more sequences takes longer, but not in proportion.
        each = (time.perf_counter() - start) / done
        progress.layer(done, len(BATCHES), f"batch {batch}", each * (len(BATCHES) - done))
    return tuple(found)


def decoding_seconds(model_dir: Path) -> float:
    """Of a step of one sequence, with int8 weights, head and KV cache; raises ``ModelLoadError``.

    The least of several runs: other programs only add to it.
    """
    core = _core(model_dir, "int8", torch.get_num_threads(), int8_weights=True)
    return 1 / max(_tokens_per_second(core, 1) for _ in range(_REPEATS))


def _core(folder: Path, kv_dtype: str, count: int, *, int8_weights: bool = False) -> EngineCore:
    blocks = BATCHES[-1] * (1 + -(-(_PROMPT + _TOKENS) // _BLOCK_SIZE))
    return EngineCore.from_config(
        EngineConfig(
            model_dir=folder,
            cache=CacheConfig(dtype=kv_dtype, block_size=_BLOCK_SIZE, blocks=blocks),
            scheduler=SchedulerConfig(max_sequences=BATCHES[-1], speculative_tokens=0),
            kernels=KernelConfig(threads=count, allow_slow=True, int8_weights=int8_weights),
        )
    )


def _bytes(report: ModelReport, batch: int) -> int:
    """Of weights, and of the blocks that so many sequences fill."""
    tokens = _prompt(report.context_length) + _tokens(report.context_length)
    blocks = batch * -(-tokens // _BLOCK_SIZE)
    return report.weight_bytes + blocks * report.kv_bytes // report.kv_blocks


def _prompt(context: int) -> int:
    return min(_PROMPT, context // 3)


def _tokens(context: int) -> int:
    return min(_TOKENS, context - _prompt(context))


def _tokens_per_second(core: EngineCore, batch: int) -> float:
    """Of ``batch`` sequences, from when all of them have their first token."""
    report = core.report()
    for request in _requests(report.vocabulary_size, report.context_length, batch):
        core.submit(request)
    begun: set[str] = set()
    while len(begun) < batch and core.has_work:
        begun |= {event.id for event in core.step().tokens}
    start, tokens = time.perf_counter(), 0
    while core.has_work:
        tokens += len(core.step().tokens)
    return tokens / (time.perf_counter() - start)


def _requests(vocabulary: int, context: int, batch: int) -> Iterable[Request]:
    draw = random.Random(0)
    for index in range(batch):
        yield Request(
            id=str(index),
            prompt=[draw.randrange(vocabulary) for _ in range(_prompt(context))],
            sampling=SamplingParams(temperature=1.0, seed=index),
            stopping=StoppingParams(max_tokens=_tokens(context)),
            arrival=0.0,
            cache_salt=str(index),
        )
