"""Native attention on INT8 pages, against SDPA on float32 keys and values and against memory.

python -m bench.attention [--quick] [--threads N] [--json FILE]

Keys and values are rotated over more than the caches hold, as the layers of a model are, in
shuffled pages. The memory's read bandwidth is measured between the kernels, with as many
threads. Turns are short, one layer or 32 MB, and the fastest of each counts, because the time that
other processes take is no property of a kernel. SDPA gets its inputs in torch's fastest form.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels import CACHES, Best, read_gb_s
from bench.serve import commit
from engine.kernels.cpu.attention import AttentionOptions, paged_attention
from engine.kernels.cpu.library import kernels
from engine.kernels.cpu.memory import aligned_empty
from engine.kv_cache import InterleavedInt8KvCache, KvShape

BLOCK = 16
READ_BYTES, READ_TURN = 512 << 20, 32 << 20


@dataclass(frozen=True)
class Case:
    """``batch`` sequences of ``context`` tokens, whose last ``rows`` are asked for."""

    heads: int
    kv_heads: int
    batch: int
    context: int
    rows: int = 1
    head_dim: int = 64

    @property
    def name(self) -> str:
        """For the report."""
        kind = "decode" if self.rows == 1 else "prefill"
        size = f"{self.batch} x {self.context}" if self.rows == 1 else f"{self.rows}"
        return f"{kind} {size}, {self.heads}/{self.kv_heads} heads"

    @property
    def kv_bytes(self) -> int:
        """Bytes of one layer's INT8 keys, values and scales."""
        return 2 * self.batch * self.context * self.kv_heads * (self.head_dim + 4)

    @property
    def flop(self) -> float:
        """Of one layer's causal products of queries with keys, and of probabilities with values."""
        pairs = self.rows * (self.context - (self.rows - 1) / 2)
        return 4.0 * self.batch * pairs * self.heads * self.head_dim

    @property
    def layers(self) -> int:
        """So many hold more than the caches; a prompt's keys are read again and again anyway."""
        return max(2, -(-CACHES // self.kv_bytes)) if self.rows == 1 else 2


class Pages:
    """A case's sequences in the shuffled blocks of a cache with random contents."""

    def __init__(self, case: Case) -> None:
        self.case = case
        width = -(-case.context // BLOCK)
        shape = KvShape(
            layers=case.layers, kv_heads=case.kv_heads, head_dim=case.head_dim, block_size=BLOCK
        )
        self.cache = InterleavedInt8KvCache(shape, case.batch * width)
        self.cache.pages.random_(0, 256)
        self.cache.scales.fill_(0.01)
        ids = list(range(case.batch * width))
        random.Random(0).shuffle(ids)
        self.block_ids_P = torch.tensor(ids, dtype=torch.int32)
        self.sequences_B4 = torch.tensor(
            [(n * case.rows, case.rows, case.context, n * width) for n in range(case.batch)],
            dtype=torch.int32,
        )
        self.q_THD = torch.randn(case.batch * case.rows, case.heads, case.head_dim)
        self.options = AttentionOptions(scale=case.head_dim**-0.5)

    def run(self, layer: int) -> None:
        """One layer."""
        pages = self.cache.layers[layer]
        paged_attention(self.q_THD, pages, self.sequences_B4, self.block_ids_P, self.options)


class Sdpa:
    """The same case with float32 keys and values, as if they were gathered already.

    A step's heads of one group are rows of one product; a prompt's keys are those of all heads,
    so that torch's causal kernel takes it. These were the fastest forms.
    """

    def __init__(self, case: Case) -> None:
        self.causal = case.rows > 1
        self.layers = 2 if self.causal else max(2, -(-CACHES // (4 * case.kv_bytes)))
        group = 1 if self.causal else case.heads // case.kv_heads
        heads, rows = case.heads // group, case.rows * group
        size = (self.layers, case.batch, heads, case.context, case.head_dim)
        self.k, self.v = torch.randn(size), torch.randn(size)
        self.q = torch.randn(case.batch, heads, rows, case.head_dim)

    def run(self, layer: int) -> None:
        """One layer."""
        k, v = self.k[layer], self.v[layer]
        F.scaled_dot_product_attention(self.q, k, v, is_causal=self.causal)


def measure(case: Case, repeats: int, memory: Tensor) -> dict[str, float]:
    """The shortest of turns that are taken in rotation."""
    pages, sdpa = Pages(case), Sdpa(case)
    int8, fp32, bandwidth = Best(), Best(), 0.0
    parts = memory.split(READ_TURN)
    for turn in range(repeats):
        for layer in range(case.layers):
            int8.time(pages.run, layer)
        for layer in range(sdpa.layers):
            fp32.time(sdpa.run, layer)
        bandwidth = max(bandwidth, read_gb_s(parts[turn % len(parts)], torch.get_num_threads(), 1))
    native_s, sdpa_s = int8.seconds, fp32.seconds
    figures = {"int8_us": native_s * 1e6, "sdpa_us": sdpa_s * 1e6, "speedup": sdpa_s / native_s}
    if case.rows == 1:
        figures["kv_gb_s"] = case.kv_bytes / native_s / 1e9
        figures["read_gb_s"] = bandwidth
        figures["share_of_read"] = figures["kv_gb_s"] / bandwidth
    else:
        figures["gflop_s"] = case.flop / native_s / 1e9
        figures["sdpa_gflop_s"] = case.flop / sdpa_s / 1e9
    return figures


def cases(quick: bool) -> list[Case]:
    found = [
        Case(heads, kv_heads, batch, context)
        for heads, kv_heads in ((32, 4), (14, 2))
        for batch in (1, 8)
        for context in (1024, 8192)
    ]
    prompts = (512,) if quick else (512, 4096)
    return found + [Case(32, 4, 1, length, rows=length) for length in prompts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    memory = aligned_empty(READ_BYTES).fill_(1)
    figures: dict[str, object] = {
        "commit": commit(),
        "kernels": kernels().name,
        "threads": torch.get_num_threads(),
    }
    for name, value in figures.items():
        print(f"{name:12} {value}")
    for case in cases(arguments.quick):
        measured = measure(case, 9 if arguments.quick else 25, memory)
        figures[case.name] = measured
        listed = "  ".join(f"{name} {value:.4g}" for name, value in measured.items())
        print(f"{case.name:30} {listed}", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
