"""Venturi's engine in process: prefill and decode, beside this machine's ceilings.

Takes the arguments of the peers' scripts and prints the same line of JSON. ``python -m
bench.cpu_engine`` runs in a process of its own, as each peer does.
"""

import statistics
import time
from pathlib import Path

import torch

from bench.kernels import read_gb_s
from bench.peers.common import (
    CHECK_NEW,
    PREFILL_TOKENS,
    Answer,
    DecodeClock,
    Settings,
    settings,
)
from bench.serve import commit
from engine.config import CacheConfig, EngineConfig, KernelConfig, SchedulerConfig
from engine.core import EngineCore
from engine.kernels.cpu.memory import aligned_empty
from engine.model_runner import ModelRunner
from engine.types import Request, SamplingParams, StoppingParams

_DRAM_BYTES = 768 << 20
_INT8_SHAPE = (PREFILL_TOKENS, 2048, 5632)
# Steps that are bounded by tokens alone, as the peers' are, so that all sequences soon decode.
_LOCKSTEP = SchedulerConfig(token_budget=PREFILL_TOKENS, max_gap_s=1e6, speculative_tokens=0)


def dram_gb_s(threads: int) -> float:
    """Reading alone, with the engine's threads; the best of some turns."""
    return read_gb_s(aligned_empty(_DRAM_BYTES).fill_(1), threads, 8)


def int8_gop_s() -> float:
    """torch's int8 product at as many rows as a prompt has, neither quantised nor scaled."""
    M, K, N = _INT8_SHAPE
    x_MK, q_KN = torch.ones(M, K, dtype=torch.int8), torch.ones(N, K, dtype=torch.int8).t()
    times = []
    for _ in range(12):
        begin = time.perf_counter()
        torch._int_mm(x_MK, q_KN)
        times.append(time.perf_counter() - begin)
    return 2 * M * K * N / min(times) / 1e9


def load(model: Path, threads: int) -> ModelRunner:
    cache, kernels = CacheConfig(memory_bytes=1 << 30), KernelConfig(threads=threads)
    return ModelRunner.from_config(EngineConfig(model_dir=model, cache=cache, kernels=kernels))


def generate(
    engine: EngineCore, prompts: list[list[int]], new: int
) -> tuple[DecodeClock, list[list[int]]]:
    """The clock of their decoding, and each sequence's new tokens."""
    for index, prompt in enumerate(prompts):
        stopping = StoppingParams(max_tokens=new)
        engine.submit(
            Request(
                id=str(index),
                prompt=prompt,
                sampling=SamplingParams(),
                stopping=stopping,
                arrival=time.monotonic(),
            )
        )
    clock = DecodeClock(len(prompts), new)
    tokens: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        counts: dict[int, int] = {}
        for event in engine.step().tokens:
            index = int(event.id)
            tokens[index].append(event.token)
            counts[index] = counts.get(index, 0) + 1
        clock.add(counts)
    return clock, tokens


def prefill_s(engine: EngineCore, prompt: list[int]) -> float:
    """Seconds to one prompt's first token."""
    begin = time.perf_counter()
    generate(engine, [prompt], 1)
    return time.perf_counter() - begin


def decode(engine: EngineCore, s: Settings) -> dict[str, float]:
    """Tokens/s by the number of sequences, without the prompts' part."""
    rates = {}
    for batch in s.batches:
        clock, _ = generate(engine, s.prompts(batch, s.prompt, "decode"), s.new)
        rates[str(batch)] = clock.tokens_per_second
    return rates


def measure(s: Settings) -> Answer:
    dram, int8 = dram_gb_s(s.threads), int8_gop_s()
    runner = load(s.model, s.threads)
    engine = EngineCore(runner, _LOCKSTEP)
    _, tokens = generate(engine, s.check_prompts(), CHECK_NEW)
    times = [prefill_s(engine, prompt) for prompt in s.prompts(4, PREFILL_TOKENS, "prefill")][1:]
    rates = decode(engine, s)
    report = engine.report()
    return Answer(
        engine="Venturi",
        version=commit(),
        prefill_tps=PREFILL_TOKENS / statistics.median(times),
        decode_tps=rates,
        tokens=tokens,
        detail={
            "dram_gb_s": max(dram, dram_gb_s(s.threads)),
            "int8_gop_s": max(int8, int8_gop_s()),
            "kernels": ", ".join(report.kernels),
            "weight_bytes": report.weight_bytes,
            "threads": s.threads,
        },
    )


if __name__ == "__main__":
    measure(settings(__doc__)).print()
