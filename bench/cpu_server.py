"""Venturi's engine through gRPC: tokens/s of streams, the client's CPU, the processes' memory."""

import asyncio
import re
import time
from dataclasses import dataclass
from pathlib import Path

from bench.peers.common import Settings
from server.testing import ServerProcess
from venturi import AsyncClient, Model

# Short, so that the streams are nearly all decoding, which is where a front end can be in the way.
STREAM_PROMPT = 64


@dataclass(frozen=True, kw_only=True)
class Served:
    """By number of streams: tokens/s and the client's seconds of CPU in a second. In bytes: the
    summed PSS of all server processes after the streams, the weights, the KV pool."""

    tps: dict[str, float]
    client_cpu: dict[str, float]
    pss_bytes: int
    weight_bytes: int
    kv_bytes: int


async def one(client: AsyncClient, prompt: list[int], new: int) -> None:
    async with client.stream(prompt, max_tokens=new, ignore_eos=True) as stream:
        end = await stream.get_final_response()
    assert end.usage.completion_tokens == new


async def streams(target: str, s: Settings) -> tuple[dict[str, float], dict[str, float], Model]:
    """Tokens/s from the requests to the last token, and the client's CPU."""
    rates, cpus = {}, {}
    async with AsyncClient(target) as client:
        (warm_up,) = s.prompts(1, STREAM_PROMPT, "warm-up")
        await one(client, warm_up, 8)
        for batch in s.batches:
            prompts = s.prompts(batch, STREAM_PROMPT, "grpc")
            cpu, begin = time.process_time(), time.perf_counter()
            await asyncio.gather(*(one(client, prompt, s.new) for prompt in prompts))
            seconds = time.perf_counter() - begin
            rates[str(batch)] = batch * s.new / seconds
            cpus[str(batch)] = (time.process_time() - cpu) / seconds
        return rates, cpus, await client.model()


def measure(s: Settings) -> Served:
    arguments = ("--recipe", "none", "--speculative-tokens", "0", "--threads", str(s.threads))
    with ServerProcess(str(s.model), *arguments) as server:
        rates, cpus, model = asyncio.run(streams(server.target, s))
        pss = sum(map(_pss_bytes, _family(server.process.pid)))
    return Served(
        tps=rates,
        client_cpu=cpus,
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
