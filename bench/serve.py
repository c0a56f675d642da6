"""The service as its clients see it: start-up, time to first token, tokens per second.

python -m bench.serve [MODEL] [--quick] [--json FILE]

Each figure through gRPC stands beside the engine's own in the same run: the ratio is what
counts, since machines differ and are noisy. The prompts are random ids of one length, so that
the work is the same for every stream.
"""

import argparse
import asyncio
import json
import platform
import random
import resource
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from server.config import EMBEDDED_MODEL
from server.testing import ServerProcess
from venturi import AsyncClient

PROMPT_TOKENS, NEW_TOKENS = 64, 128


@dataclass(frozen=True)
class Run:
    """Medians over repetitions."""

    streams: int
    ttft_ms: float
    tokens_per_second: float
    client_cpu: float


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(4, 4096) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


async def one(client: AsyncClient, prompt: list[int], start: float) -> float:
    """Seconds to the first token."""
    first = 0.0
    async with client.stream(prompt, max_tokens=NEW_TOKENS, ignore_eos=True) as stream:
        async for _ in stream:
            first = first or time.perf_counter() - start
    return first


async def through_grpc(target: str, streams: int, repeats: int) -> Run:
    """All streams at once; the first repetition warms up and is dropped."""
    ttfts, rates, cpus = [], [], []
    async with AsyncClient(target) as client:
        for _ in range(repeats + 1):
            cpu, start = time.process_time(), time.perf_counter()
            firsts = await asyncio.gather(*(one(client, p, start) for p in prompts(streams)))
            seconds = time.perf_counter() - start
            ttfts.append(statistics.median(firsts) * 1e3)
            rates.append(streams * NEW_TOKENS / seconds)
            cpus.append((time.process_time() - cpu) / seconds)
    median = statistics.median
    return Run(streams, median(ttfts[1:]), median(rates[1:]), median(cpus[1:]))


def in_process(folder: Path, streams: int, repeats: int) -> float:
    """Tokens per second of the same work without processes, sockets and text."""
    from engine.config import EngineConfig
    from engine.core import EngineCore
    from engine.types import Request, SamplingParams, StoppingParams

    core = EngineCore.from_config(EngineConfig(model_dir=folder))
    rates = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for index, prompt in enumerate(prompts(streams)):
            core.submit(
                Request(
                    id=str(index),
                    prompt=prompt,
                    sampling=SamplingParams(),
                    stopping=StoppingParams(max_tokens=NEW_TOKENS),
                    arrival=start,
                )
            )
        while core.has_work:
            core.step()
        rates.append(streams * NEW_TOKENS / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def transformers_generate(folder: Path, repeats: int) -> float:
    """Tokens per second of transformers' generate, fp32, one sequence."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(prompts(1))
    rates = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        model.generate(  # type: ignore[misc]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        rates.append(NEW_TOKENS / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def measure(model: Path, counts: list[int], repeats: int) -> dict[str, object]:
    """The whole measurement, as it is written to JSON."""
    with tempfile.TemporaryDirectory() as cache:
        arguments = (str(model), "--cache-dir", cache)
        with ServerProcess(*arguments) as cold:
            cold_s = cold.seconds_to_ready
        with ServerProcess(*arguments) as server:
            warm_s = server.seconds_to_ready
            runs = [asyncio.run(through_grpc(server.target, n, repeats)) for n in counts]
        client_rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        (artefact,) = (Path(cache) / "artefacts").glob("[0-9a-f]*")
        engine = {n: in_process(artefact, n, repeats) for n in counts}
    figures: dict[str, object] = {
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "commit": commit(),
        "start_cold_s": cold_s,
        "start_warm_s": warm_s,
        "transformers_fp32_tps": transformers_generate(model, repeats),
        "client_peak_rss_mb": client_rss_mb,
    }
    for run in runs:
        prefix = f"streams_{run.streams}"
        figures[f"{prefix}_ttft_ms"] = run.ttft_ms
        figures[f"{prefix}_tps"] = run.tokens_per_second
        figures[f"{prefix}_engine_tps"] = engine[run.streams]
        figures[f"{prefix}_grpc_share_of_engine"] = run.tokens_per_second / engine[run.streams]
        figures[f"{prefix}_client_cpu"] = run.client_cpu
    return figures


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", nargs="?", type=Path, default=EMBEDDED_MODEL)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    figures = measure(arguments.model, [1, 8, 32], 3 if arguments.quick else 9)
    for name, value in figures.items():
        print(f"{name:32} {value:.3f}" if isinstance(value, float) else f"{name:32} {value}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
