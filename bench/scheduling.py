"""What the scheduler brings: bounded gaps between tokens, a prefix cache, speculation.

python -m bench.scheduling [--quick] [--json FILE]

Eight streams decode while long prompts arrive. With unbounded steps each prompt is one step
and every stream waits for it; with bounded steps it is computed in chunks between their tokens.
Both run in process on the same random-weight model, so that the ratio is what counts.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench.random_model import TINY, write
from bench.serve import commit
from compress import compress
from engine.client.tokenizer import Tokenizer
from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.core import EngineCore
from engine.types import Request, SamplingParams, StoppingParams

STREAMS, STREAM_PROMPT = 8, 32
# Drafts would make gaps of no time: a step's tokens come together.
BOUNDED = SchedulerConfig(token_budget=512, max_gap_s=0.1, speculative_tokens=0)
UNBOUNDED = SchedulerConfig(token_budget=1 << 20, max_gap_s=1e6, speculative_tokens=0)


@dataclass(frozen=True)
class Load:
    """Long prompts of ``prompt`` tokens arrive every ``every`` tokens of the first stream."""

    prompt: int
    arrivals: int
    every: int


def request(name: str, tokens: list[int], new: int) -> Request:
    return Request(
        id=name,
        prompt=tokens,
        sampling=SamplingParams(),
        stopping=StoppingParams(max_tokens=new),
        arrival=time.monotonic(),
    )


def random_tokens(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(4, TINY.vocabulary) for _ in range(count)]


def make_core(folder: Path, scheduler: SchedulerConfig) -> EngineCore:
    cache = CacheConfig(memory_bytes=1 << 30)
    core = EngineCore.from_config(EngineConfig(model_dir=folder, cache=cache, scheduler=scheduler))
    core.submit(request("warm-up", random_tokens(256, 0), 16))
    drain(core)
    return core


def drain(core: EngineCore) -> None:
    while core.has_work:
        core.step()


def gaps(core: EngineCore, load: Load) -> dict[str, float]:
    """Seconds between two tokens of the streams, and tokens per second of everything."""
    new = load.every * (load.arrivals + 1)
    for index in range(STREAMS):
        core.submit(request(f"s{index}", random_tokens(STREAM_PROMPT, index), new))
    last: dict[str, float] = {}
    waits: list[float] = []
    seen = arrived = total = 0
    begin = time.perf_counter()
    while core.has_work:
        output = core.step()
        now = time.perf_counter()
        for event in output.tokens:
            total += 1
            if event.id in last and event.id.startswith("s"):
                waits.append(now - last[event.id])
            last[event.id] = now
            seen += event.id == "s0"
        if arrived < load.arrivals and seen >= load.every * (arrived + 1):
            core.submit(request(f"p{arrived}", random_tokens(load.prompt, 100 + arrived), 1))
            arrived += 1
    seconds = time.perf_counter() - begin
    work = total + load.arrivals * load.prompt
    waits.sort()
    return {
        "gap_p50": statistics.median(waits),
        "gap_p99": waits[int(0.99 * (len(waits) - 1))],
        "gap_max": waits[-1],
        "tokens_per_second": work / seconds,
    }


def first_token_s(core: EngineCore, tokens: list[int], name: str) -> float:
    begin = time.perf_counter()
    core.submit(request(name, tokens, 1))
    drain(core)
    return time.perf_counter() - begin


def prefix_gain(core: EngineCore, prompt: int, repeats: int) -> float:
    """Time to the first token without over with the prompt's beginning in the cache."""
    ratios = []
    for index in range(repeats):
        shared = random_tokens(prompt, 1000 + index)
        miss = first_token_s(core, [*shared, 5, 6, 7], f"m{index}")
        hit = first_token_s(core, [*shared, 8, 9, 10], f"h{index}")
        ratios.append(miss / hit)
    return statistics.median(ratios)


def decode_s(folder: Path, prompt: list[int], most: int, repeats: int) -> float:
    """Seconds of one greedy answer with at most ``most`` drafts a step."""
    core = make_core(folder, SchedulerConfig(speculative_tokens=most))
    seconds = []
    for index in range(repeats):
        begin = time.perf_counter()
        core.submit(request(f"d{index}", prompt, 128))
        drain(core)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def speculation_gains(repeats: int) -> dict[str, float]:
    """The shipped model's speed with drafts over without: text that repeats itself, and other."""
    folder, gains = Path("server/assets/venturi-mini"), {}
    tokenizer = Tokenizer.from_folder(folder)
    for name, text in (("repetitive", "The cat sat on the mat. " * 8), ("prose", "Once upon a")):
        prompt = tokenizer.encode(text)
        plain, drafted = (decode_s(folder, prompt, most, repeats) for most in (0, 4))
        gains[f"speculation_gain_{name}"] = plain / drafted
    return gains


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    load = Load(prompt=4096, arrivals=3 if arguments.quick else 12, every=24)
    with tempfile.TemporaryDirectory() as scratch:
        original = write(TINY, Path(scratch) / "model")
        artefact = Path(scratch) / "w8a8"
        compress("w8a8", original, artefact)
        bounded = make_core(artefact, BOUNDED)
        chunked = gaps(bounded, load)
        gain = prefix_gain(bounded, load.prompt // 2, 3)
        unchunked = gaps(make_core(artefact, UNBOUNDED), load)
    figures: dict[str, object] = {"commit": commit(), "long_prompt_tokens": load.prompt}
    for kind, measured in (("chunked", chunked), ("unchunked", unchunked)):
        figures |= {f"{name}_{kind}": value for name, value in measured.items()}
    figures["prefix_cache_ttft_gain"] = gain
    figures |= speculation_gains(3 if arguments.quick else 9)
    for name, value in figures.items():
        print(f"{name:32} {value:.4f}" if isinstance(value, float) else f"{name:32} {value}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
