"""Attention of one layer: projections, positions, the paged cache, and what comes between."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.batch import ForwardContext
from engine.kernels import kernel
from engine.kv_cache import KvCache
from engine.layers.linear import Linear
from engine.layers.norm import Norm
from engine.layers.rotary import rotate, rotate_part
from engine.models.spec import LayerSpec


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one step share; ``rotary`` holds (cos, sin) [T, 1, D] of each rope."""

    context: ForwardContext
    cache: KvCache
    rotary: tuple[tuple[Tensor, Tensor], ...]


Attention = Callable[[Tensor, Step], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWeights:
    """Matrices and norms; q, k and v are fused by their out-features."""

    qkv: Linear
    o: Linear
    q_norm: Norm
    k_norm: Norm


def make_attention(
    spec: LayerSpec, weights: AttentionWeights, index: int, rope_dim: int, backend: str
) -> Attention:
    """[T, K] -> [T, K]. ``index`` is the layer's place in the KV cache."""
    heads, kv_heads, dim = spec.heads, spec.kv_heads, spec.head_dim
    sizes = (heads * dim, kv_heads * dim, kv_heads * dim)
    project = _clipped(weights.qkv, spec.qkv_clip)
    to_q = _split_heads(weights.q_norm, heads, spec)
    to_k = _split_heads(weights.k_norm, kv_heads, spec)
    turn = _turn(spec, rope_dim)
    attend = _attend(spec, backend)

    def attention(x_TK: Tensor, step: Step) -> Tensor:
        q, k, v = project(x_TK).split(sizes, dim=1)
        q_THD, k_TJD = turn(to_q(q), step), turn(to_k(k), step)
        v_TJD = v.view(-1, kv_heads, dim)
        step.cache.write(index, k_TJD, v_TJD, step.context.slots_T)
        return weights.o(_paged_attention(q_THD, index, step, attend).flatten(1))

    return attention


def alibi_slopes(heads: int, largest: float) -> Tensor:
    """float32 [H], as MPT has them: 2 ** -(largest * i / n) for n the next power of two.

    Where the heads are no power of two: every second slope first, then the others.
    """
    power = 1 << (heads - 1).bit_length()
    slopes = 1.0 / 2 ** (torch.arange(1, power + 1).float() * (largest / power))
    if power != heads:
        slopes = torch.cat((slopes[1::2], slopes[::2]))[:heads]
    return slopes


def _attend(spec: LayerSpec, backend: str) -> Callable[..., Tensor]:
    slopes_H = None if spec.alibi is None else alibi_slopes(spec.heads, spec.alibi)
    options = {"scale": spec.scale, "window": spec.window, "cap": spec.score_cap}
    return partial(kernel("attention", backend), slopes_H=slopes_H, **options)


def _clipped(linear: Linear, most: float | None) -> Callable[[Tensor], Tensor]:
    if most is None:
        return linear
    return lambda x_TK: linear(x_TK).clamp_(-most, most)


def _split_heads(norm: Norm, heads: int, spec: LayerSpec) -> Callable[[Tensor], Tensor]:
    """[T, heads * D] -> [T, heads, D], normed."""
    if spec.qk_norm == "all":
        return lambda x: norm(x).view(-1, heads, spec.head_dim)
    return lambda x: norm(x.view(-1, heads, spec.head_dim))


def _turn(spec: LayerSpec, rope_dim: int) -> Callable[[Tensor, Step], Tensor]:
    rope = spec.rope
    if rope is None:
        return lambda x_THD, _step: x_THD
    if rope_dim < spec.head_dim:
        return lambda x_THD, step: rotate_part(x_THD, *step.rotary[rope])
    return lambda x_THD, step: rotate(x_THD, *step.rotary[rope])


def _paged_attention(
    q_THD: Tensor, layer: int, step: Step, attend: Callable[..., Tensor]
) -> Tensor:
    outputs = []
    for group in step.context.groups:
        lens_B = group.context_lens_B
        k, v = step.cache.read(layer, group.block_tables_BP, lens_B)
        rows = q_THD[group.begin : group.begin + group.count * group.length]
        q_BLHD = rows.unflatten(0, (group.count, group.length))
        outputs.append(attend(q_BLHD, k, v, lens_B).flatten(0, 1))
    return torch.cat(outputs)
