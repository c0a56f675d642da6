"""Linear kernels against the memory's and the arithmetic's ceilings, and against torch's.

python -m bench.kernels [--quick] [--threads N] [--json FILE]

GB/s of weights at one row; GOP/s (2 M N K) at more; zeros that are left out count as work, and not
as bytes. Weights rotate over more than the caches
hold. All kernels take turns within one run; the fastest of a kernel's turns counts, because the
time that other processes take is no property of a kernel.
"""

import argparse
import ctypes
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.serve import commit
from engine.formats.grouped import GroupedWeight
from engine.formats.int_quantized import Int8Weight
from engine.kernels.cpu.grouped import PackedGroupedLinear, per_channel
from engine.kernels.cpu.library import address, kernels
from engine.kernels.cpu.linear import PackedInt8Linear
from engine.kernels.cpu.memory import aligned_empty
from engine.kernels.cpu.sparse import PackedSparseLinear

# (N, K) of a 1.1B Llama: gate and up, down, q, k and v, and a 0.4B one's down.
SHAPES = ((11264, 2048), (2048, 5632), (2560, 2048), (896, 4864))
ROWS = (1, 2, 4, 8, 32, 512)
DENSE, SPARSE = "w8a8", ("w8a8 50 %", "w8a8 2:4")
CACHES = 96 << 20
INT8_PEAK = ("torch _int_mm", 512)

# One layer: x [M, K] -> out, and the bytes of its weights.
Figures = dict[str, dict[int, float]]  # by name and rows
Layer = tuple[Callable[[Tensor], object], int]


class ReadArgs(ctypes.Structure):
    """``ReadArgs`` of csrc/read.cpp."""

    _fields_ = (
        ("bytes", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("sums", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    )


@dataclass
class Best:
    """The shortest of some times."""

    seconds: float = float("inf")

    def time(self, run: Callable[..., object], *arguments: object) -> None:
        """One turn."""
        begin = time.perf_counter()
        run(*arguments)
        self.seconds = min(self.seconds, time.perf_counter() - begin)


def read_gb_s(buffer: Tensor, threads: int, repeats: int) -> float:
    sums, best = torch.empty(max(threads, 1), dtype=torch.int32), Best()
    args = ReadArgs(address(buffer), len(buffer), address(sums), threads)
    for _ in range(repeats):
        best.time(kernels().entry("read"), ctypes.byref(args))
    return len(buffer) / best.seconds / 1e9


def random_int8(N: int, K: int) -> Int8Weight:
    return Int8Weight(torch.randint(-128, 128, (N, K), dtype=torch.int8), torch.rand(N))


def random_int4(N: int, K: int, group: int) -> GroupedWeight:
    q_NK = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    return GroupedWeight(q_NK, torch.rand(N, K // group).half(), None, group, 4)


def random_sparse(N: int, K: int, structure: str) -> Int8Weight:
    """Half of the weights are 0."""
    weight = random_int8(N, K)
    if structure == "2:4":
        order = torch.rand(N, K // 4, 4).argsort(2)
        weight.q_NK.mul_((order < 2).flatten(1))
    else:
        weight.q_NK.mul_(torch.rand(N, K) < 0.5)
    return weight


def native(layer: PackedInt8Linear | PackedGroupedLinear | PackedSparseLinear) -> Layer:
    return layer, layer.nbytes


def torch_fp32(N: int, K: int) -> Layer:
    weight_NK = torch.randn(N, K)
    return lambda x_MK: torch.nn.functional.linear(x_MK, weight_NK), weight_NK.nbytes


def torch_int_mm(N: int, K: int) -> Layer:
    """The product alone: neither quantises nor scales."""
    q_KN = random_int8(N, K).q_NK.t()
    rows = {M: torch.randint(-127, 128, (M, K), dtype=torch.int8) for M in ROWS}
    return lambda x_MK: torch._int_mm(rows[len(x_MK)], q_KN), N * K


def torch_dynamic(N: int, K: int) -> Layer:
    scale_N, zero_N = torch.rand(N) + 0.01, torch.zeros(N, dtype=torch.int64)
    weight = torch.quantize_per_channel(torch.randn(N, K), scale_N, zero_N, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    return lambda x_MK: torch.ops.quantized.linear_dynamic(x_MK, packed, reduce_range=False), N * K


KERNELS: dict[str, Callable[[int, int], Layer]] = {
    DENSE: lambda N, K: native(PackedInt8Linear.pack(random_int8(N, K))),
    SPARSE[0]: lambda N, K: native(PackedSparseLinear.pack(random_sparse(N, K, "50 %"))),
    SPARSE[1]: lambda N, K: native(PackedSparseLinear.pack(random_sparse(N, K, "2:4"))),
    "w4a8 g32": lambda N, K: native(PackedGroupedLinear.pack(random_int4(N, K, 32), "int8")),
    "w4a8 g128": lambda N, K: native(PackedGroupedLinear.pack(random_int4(N, K, 128), "int8")),
    "w8a16": lambda N, K: native(
        PackedGroupedLinear.pack(per_channel(random_int8(N, K)), "float32")
    ),
    "w4a16 g32": lambda N, K: native(PackedGroupedLinear.pack(random_int4(N, K, 32), "float32")),
    "torch fp32": torch_fp32,
    "torch _int_mm": torch_int_mm,
    "torch linear_dynamic": torch_dynamic,
}


def measure(shape: tuple[int, int], seconds: float) -> tuple[Figures, Figures]:
    """GB/s at one row and GOP/s at more, of each kernel; the sparse ones' speed-ups."""
    N, K = shape
    layers: dict[str, list[Layer]] = {}
    for name, make in KERNELS.items():
        first = make(N, K)
        count = max(2, -(-CACHES // first[1]))
        layers[name] = [first, *(make(N, K) for _ in range(count - 1))]
    results: Figures = {name: {} for name in KERNELS}
    speed_ups: Figures = {name: {} for name in SPARSE}
    for M in ROWS:
        x_MK, best, end = torch.randn(M, K), {name: Best() for name in KERNELS}, 0.0
        for turn in range(1_000_000):
            for name, copies in layers.items():
                best[name].time(copies[turn % len(copies)][0], x_MK)
            if turn == 1:
                end = time.perf_counter() + seconds
            if turn > 1 and time.perf_counter() > end:
                break
        for name, copies in layers.items():
            work = copies[0][1] if M == 1 else 2 * M * N * K
            results[name][M] = work / best[name].seconds / 1e9
        for name in SPARSE:
            speed_ups[name][M] = best[DENSE].seconds / best[name].seconds
    return results, speed_ups


def table(shape: tuple[int, int], results: Figures, speed_ups: Figures, dram: float) -> str:
    """Figures, and in brackets the share of the DRAM bandwidth or of _int_mm at 512 rows."""
    peak = results[INT8_PEAK[0]][INT8_PEAK[1]]
    lines = [f"{shape[0]} x {shape[1]}", f"{'kernel':22}" + "".join(f"{M:>16}" for M in ROWS)]
    for name, by_rows in results.items():
        cells = ""
        for M, figure in by_rows.items():
            share = figure / (dram if M == 1 else peak)
            cells += f"{figure:10.1f} {share:4.0%} "
        lines.append(f"{name:22}{cells}")
    for name, by_rows in speed_ups.items():
        ratios = "".join(f"{ratio:15.2f}x" for ratio in by_rows.values())
        lines.append(f"{f'{name} / {DENSE}':22}{ratios}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", "torch.quantize_per")  # deprecated, and a peer
    buffer = aligned_empty(256 << 20).fill_(1)
    dram = read_gb_s(buffer, arguments.threads, 10)
    seconds = 2.0 if arguments.quick else 8.0
    figures: dict[str, object] = {
        "commit": commit(),
        "kernels": kernels().name,
        "threads": arguments.threads,
    }
    print(*(f"{name} {value}" for name, value in figures.items()), sep="\n")
    for shape in SHAPES[:1] if arguments.quick else SHAPES:
        results, speed_ups = measure(shape, seconds)
        dram = max(dram, read_gb_s(buffer, arguments.threads, 10))
        print(f"DRAM read {dram:.1f} GB/s", table(shape, results, speed_ups, dram), sep="\n")
        for name, by_rows in results.items():
            for M, figure in by_rows.items():
                unit = "gb_s" if M == 1 else "gop_s"
                figures[f"{name} {shape[0]}x{shape[1]} m{M} {unit}"] = figure
        for name, by_rows in speed_ups.items():
            for M, ratio in by_rows.items():
                figures[f"{name} {shape[0]}x{shape[1]} m{M} speed_up"] = ratio
    figures["dram_read_gb_s"] = dram
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
