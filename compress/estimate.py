"""What a job will need, from shapes and this host's measured speed: memory, disk, time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from compress.generated import sequence_bytes, sequences_at_once
from compress.host_speed import HostSpeed
from compress.methods import METHODS
from compress.plan import Plan
from compress.recipe import Recipe
from compress.sequential import MAPPED_BYTES
from engine.formats.checkpoint import Checkpoint

_SPARE_BYTES = 300 << 20
# Config, tokenizer and manifest beside the weights.
_SPARE_DISK_BYTES = 64 << 20
# Tokens between products: norms, attention, sampling; in products' time of so many weights.
_TOKEN_WEIGHTS = 1_000_000
# An int8 product takes this share of a float32 one's time.
_INT8_SHARE = 0.3
# Searches of a scaling or of AWQ's clipping round a weight so many times.
_SEARCHES = 40
_SPARE_S = 0.3


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of one job. ``tokens`` and ``hidden_bytes`` are 0 where nothing is calibrated."""

    plan: Plan
    tokens: int
    length: int
    hidden_bytes: int
    weights: int
    layer_weights: int
    widths: tuple[int, ...]

    @classmethod
    def of(cls, plan: Plan, recipe: Recipe, checkpoint: Checkpoint) -> "Sizes":
        """``widths`` are those of a layer's shared inputs."""
        one, calibration = plan.spec.layer, recipe.calibration
        length = tokens = 0
        if plan.calibrated and calibration is not None:
            length = min(calibration.length, plan.spec.context_length)
            tokens = calibration.samples * length
        heads, kv = one.heads * one.head_dim, one.kv_heads * one.head_dim
        experts = 1 if one.experts is None else one.experts.count
        mlp = (3 if one.gated else 2) * one.hidden_size * one.mlp_size * experts
        return cls(
            plan=plan,
            tokens=tokens,
            length=length,
            hidden_bytes=4 * tokens * one.hidden_size,
            weights=sum(math.prod(info.shape) for info in checkpoint.tensors.values()),
            layer_weights=one.hidden_size * (2 * heads + 2 * kv) + mlp,
            widths=(one.hidden_size, heads, *[one.hidden_size, one.mlp_size] * experts),
        )


def calibration_bytes(sizes: Sizes) -> int:
    """Memory: two layers in float32, one layer's Hessians, and the samples' hidden states.

    While the widest Hessian is factored, three more of its size are held. Large hidden states
    lie on the disk.
    """
    hessians = sum(width**2 for width in sizes.widths) + 3 * max(sizes.widths) ** 2
    hidden = sizes.hidden_bytes if sizes.hidden_bytes < MAPPED_BYTES else 0
    return 4 * (2 * sizes.layer_weights + hessians) + hidden + _SPARE_BYTES


def generation_bytes(sizes: Sizes, checkpoint: Checkpoint) -> int:
    """Memory: the whole model in int8, keys and values, and the largest tensor twice as stored."""
    spec = sizes.plan.spec
    kv = sequences_at_once(spec, sizes.length) * sequence_bytes(spec, sizes.length)
    largest = max(info.nbytes for info in checkpoint.tensors.values())
    return sizes.weights + kv + 2 * largest + _SPARE_BYTES


def writing_bytes(plan: Plan, checkpoint: Checkpoint, shard_bytes: int) -> int:
    """Memory: a shard, and the largest tensor twice."""
    largest = max(info.nbytes for info in checkpoint.tensors.values())
    return min(shard_bytes, plan.out_bytes) + 2 * largest + (32 << 20)


def disk_bytes(sizes: Sizes) -> int:
    """A calibrated job has its layers twice for a moment."""
    hidden = sizes.hidden_bytes if sizes.hidden_bytes >= MAPPED_BYTES else 0
    times = 2 if sizes.plan.calibrated else 1
    return sizes.plan.out_bytes * times + hidden + _SPARE_DISK_BYTES


def rounding_seconds(
    plan: Plan,
    checkpoint: Checkpoint,
    speed: HostSpeed,
    rounding: Mapping[tuple[object, ...], float],
) -> float:
    """To round and write everything. ``rounding``: a weight's seconds, by way of storing."""
    seconds, kept = _SPARE_S, 0
    for name, info in checkpoint.tensors.items():
        treatment = plan.treatments.get(name.removesuffix(".weight"))
        if treatment is None or name == name.removesuffix(".weight"):
            kept += info.nbytes
            continue
        # Rounded, and unpacked again when the model is tried.
        seconds += 2 * rounding[treatment.scheme_key] * math.prod(info.shape)
    written = plan.out_bytes * (3 * speed.digest + speed.write)
    return seconds + kept * speed.digest + written


def calibrating_seconds(
    sizes: Sizes, speed: HostSpeed, rounding: float, *, generate: bool
) -> float:
    """Text, two passes of each layer, Hessians, column loops, searches.

    ``rounding``: seconds to round all weights once, which is counted elsewhere.
    """
    plan, tokens = sizes.plan, sizes.tokens
    layers = len(plan.spec.layers)
    passes = 2 * tokens * layers * (sizes.layer_weights + _TOKEN_WEIGHTS)
    hessians = layers * sum(tokens * width**2 + width**3 for width in sizes.widths)
    text = 0.0
    if generate:
        text = tokens * (_INT8_SHARE * sizes.weights + 2 * _TOKEN_WEIGHTS)
    products = passes + hessians + text
    return products * speed.product + _loops(plan, sizes, speed) + rounding * _search_count(plan)


def _loops(plan: Plan, sizes: Sizes, speed: HostSpeed) -> float:
    """GPTQ's and SparseGPT's columns, and the errors of what they are compared with."""
    share = sum(
        any(m.type in ("gptq", "sparsegpt") for m in one.modifiers)
        for one in plan.treatments.values()
    ) / len(plan.treatments)
    layers, hidden = len(plan.spec.layers), plan.spec.layer.hidden_size
    columns = layers * sizes.layer_weights / hidden
    products = 4 * layers * sizes.layer_weights * max(sizes.widths)
    return share * (columns * speed.column * max(1, hidden / 512) + products * speed.product)


def _search_count(plan: Plan) -> int:
    searching = any(
        "scaling" in METHODS[m.type].kinds
        for one in plan.treatments.values()
        for m in one.modifiers
    )
    return _SEARCHES if searching else 0
