"""What each group takes in each scheme: bytes as stored, and seconds of decoding on this host.

A group's matrix is timed with one row by the kernels that serve; what a step takes besides is
measured once, on the whole model. Shape letters: N out-features, K in-features.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from compress.auto.candidates import CANDIDATES, ORIGINAL, Group
from compress.measure.speed import decoding_seconds
from compress.plan import Plan
from compress.steps import DTYPES
from engine.formats import int_quantized, pack_quantized
from engine.formats.checkpoint import Checkpoint
from engine.formats.grouped import GroupedWeight
from engine.formats.int_quantized import Int8Weight
from engine.kernels import resolve
from engine.layers.linear import Linear, make_fused

# Copies that are used in turn, as many as the model has weights, so that they lie in caches or in
# memory as the model's do: of more bytes than this, all lie in memory.
_COPIES_BYTES = 96 << 20
_ROUNDS, _LEAST_S = 5, 0.01

# Out-features of the modules that are one matrix, and its in-features.
Shape = tuple[tuple[int, ...], int]


def stored_bytes(
    groups: Sequence[Group], plans: Mapping[str, Plan], checkpoint: Checkpoint
) -> list[dict[str, int]]:
    """For each group, by the schemes that its rows can have. ``plans`` are of uniform recipes."""
    known: dict[tuple[tuple[int, ...], str, torch.dtype], int] = {}
    found = []
    for group in groups:
        infos = {module: checkpoint.info(f"{module}.weight") for module in group.modules}
        sizes = {ORIGINAL: sum(info.nbytes for info in infos.values())}
        for scheme, plan in plans.items():
            if any(plan.treatments[module].fell_back for module in group.modules):
                continue
            sizes[scheme] = 0
            for module, info in infos.items():
                shape = info.shape[:: -1 if module in plan.transposed else 1]
                key = (shape, scheme, DTYPES[info.dtype])
                if key not in known:
                    known[key] = _packed_bytes(*key)
                sizes[scheme] += known[key]
        found.append(sizes)
    return found


def group_seconds(
    groups: Sequence[Group],
    plan: Plan,
    checkpoint: Checkpoint,
    schemes: Sequence[Sequence[str]],
) -> list[dict[str, float]]:
    """For each group, by those ``schemes`` that it can have. Raises ``ModelLoadError``."""
    backend, weights = resolve("auto"), sum(plan.weights[m] for g in groups for m in g.modules)
    known: dict[tuple[Shape, str], float] = {}
    found = []
    for group, possible in zip(groups, schemes, strict=True):
        shape, times = _shape(group, plan, checkpoint)
        for scheme in possible:
            if (shape, scheme) not in known:
                known[shape, scheme] = _seconds(shape, scheme, backend, weights)
        found.append({scheme: times * known[shape, scheme] for scheme in possible})
    return found


def other_seconds(model_dir: Path, seconds: Sequence[Mapping[str, float]]) -> float:
    """Of a step, without the groups' matrices: head, attention, norms, sampling."""
    whole = decoding_seconds(model_dir)
    return max(0.0, whole - sum(one["w8a8"] for one in seconds))


def _packed_bytes(shape: tuple[int, ...], scheme: str, dtype: torch.dtype) -> int:
    weight = _made_up(shape[0], shape[1], scheme, dtype)
    if isinstance(weight, Int8Weight):
        tensors = int_quantized.pack(weight)
    else:
        tensors = pack_quantized.pack(weight)
    return sum(tensor.nbytes for tensor in tensors.values())


def _shape(group: Group, plan: Plan, checkpoint: Checkpoint) -> tuple[Shape, int]:
    """And how many such matrices a token runs through: as many as it has experts."""
    experts, mlps = plan.spec.layers[group.layer].experts, plan.spec.names[group.layer].mlps
    modules, times = group.modules, 1
    if experts is not None and group.part in ("up", "down"):
        modules = (mlps[0].up if group.part == "up" else mlps[0].down).modules
        times = experts.chosen
    shapes = [
        checkpoint.info(f"{module}.weight").shape[:: -1 if module in plan.transposed else 1]
        for module in modules
    ]
    return (tuple(shape[0] for shape in shapes), shapes[0][1]), times


def _seconds(shape: Shape, scheme: str, backend: str, model_weights: int) -> float:
    """The least mean of several rounds: other programs only add to it."""
    sizes, columns = shape

    def make() -> Linear:
        weights = [_made_up(rows, columns, scheme, torch.bfloat16) for rows in sizes]
        return make_fused(weights, backend)

    copies = [make()]
    most = min(_COPIES_BYTES / copies[0].nbytes, model_weights / (sum(sizes) * columns))
    count = max(1, math.ceil(most))
    copies += [make() for _ in range(count - 1)]
    x_1K = torch.randn(1, columns, generator=torch.Generator().manual_seed(0))
    return min(_mean_seconds(copies, x_1K) for _ in range(_ROUNDS))


@torch.inference_mode()
def _mean_seconds(copies: Sequence[Linear], x_1K: Tensor) -> float:
    begin, calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begin) < _LEAST_S or not calls:
        for linear in copies:
            linear(x_1K)
        calls += len(copies)
    return elapsed / calls


def _made_up(
    rows: int, columns: int, scheme: str, dtype: torch.dtype
) -> Int8Weight | GroupedWeight:
    """A weight whose scales have ``dtype``: neither sizes nor times depend on values."""
    modifier = CANDIDATES[scheme]
    q_NK = torch.ones(rows, columns, dtype=torch.int8)
    scale_NG = torch.full((rows, columns // (modifier.group_size or columns)), 0.01, dtype=dtype)
    if modifier.group_size is None:
        return Int8Weight(q_NK, scale_NG[:, 0])
    zero_NG = None if modifier.symmetric else torch.ones_like(scale_NG, dtype=torch.int8)
    return GroupedWeight(q_NK, scale_NG, zero_NG, modifier.group_size, 4)
