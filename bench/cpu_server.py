"""Venturi's engine through gRPC beside the same engine in process: tokens/s, CPU, memory.

Takes the arguments of the peers' scripts and prints a line of JSON. The two take turns within
seconds, on the same work, since a machine's speed changes from minute to minute.
"""

import asyncio
import json
import re
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.cpu_engine import generate, load
from bench.peers.common import Settings, settings
from engine.config import SchedulerConfig
from engine.core import EngineCore
from server.testing import ServerProcess
from venturi import AsyncClient, Model

# Short, so that the streams are nearly all decoding, which is where a front end can be in the way.
STREAM_PROMPT = 64
_ROUNDS = 3
# As the server is started.
_SCHEDULER = SchedulerConfig(speculative_tokens=0)


@dataclass(frozen=True, kw_only=True)
class Served:
    """By number of streams: tokens/s, their share of the engine's in process, and the client's
    seconds of CPU in a second; medians of the rounds. In bytes: the summed PSS of all server
    processes after the streams, the weights, the KV pool.
    """

    tps: dict[str, float]
    share: dict[str, float]
    client_cpu: dict[str, float]
    pss_bytes: int
    weight_bytes: int
    kv_bytes: int


async def one(client: AsyncClient, prompt: list[int], new: int) -> None:
    async with client.stream(prompt, max_tokens=new, ignore_eos=True) as stream:
        end = await stream.get_final_response()
    assert end.usage.completion_tokens == new


async def streamed(client: AsyncClient, prompts: list[list[int]], new: int) -> float:
    """Seconds from the requests to the last token."""
    begin = time.perf_counter()
    await asyncio.gather(*(one(client, prompt, new) for prompt in prompts))
    return time.perf_counter() - begin


def in_process(engine: EngineCore, prompts: list[list[int]], new: int) -> float:
    """Seconds from the submission to the last token."""
    begin = time.perf_counter()
    generate(engine, prompts, new)
    return time.perf_counter() - begin


async def rounds(
    target: str, engine: EngineCore, s: Settings
) -> tuple[list[dict[str, float]], Model]:
    """Tokens/s, share and CPU for each batch, in this order, and what is served."""
    found: list[dict[str, float]] = [{}, {}, {}]
    async with AsyncClient(target) as client:
        (warm_up,) = s.prompts(1, STREAM_PROMPT, "warm-up")
        in_process(engine, [warm_up], 8)
        await one(client, warm_up, 8)
        for batch in s.batches:
            turns = []
            for turn in range(_ROUNDS):
                prompts = s.prompts(batch, STREAM_PROMPT, f"grpc {turn}")
                alone = in_process(engine, prompts, s.new)
                cpu = time.process_time()
                seconds = await streamed(client, prompts, s.new)
                used = time.process_time() - cpu
                turns.append((batch * s.new / seconds, alone / seconds, used / seconds))
            for figures, values in zip(found, zip(*turns, strict=True), strict=True):
                figures[str(batch)] = statistics.median(values)
        return found, await client.model()


def measure(s: Settings) -> Served:
    arguments = ("--recipe", "none", "--speculative-tokens", "0", "--threads", str(s.threads))
    with ServerProcess(str(s.model), *arguments) as server:
        engine = EngineCore(load(s.model, s.threads), _SCHEDULER)
        (tps, share, cpu), model = asyncio.run(rounds(server.target, engine, s))
        pss = sum(map(_pss_bytes, _family(server.process.pid)))
    return Served(
        tps=tps,
        share=share,
        client_cpu=cpu,
        pss_bytes=pss,
        weight_bytes=model.precision.weight_bytes,
        kv_bytes=model.kv_cache.bytes,
    )


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(member for child in children for member in _family(int(child)))]


def _pss_bytes(pid: int) -> int:
    found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(asdict(measure(settings(__doc__)))), flush=True)
