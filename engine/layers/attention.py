"""Attention of one layer: projections, positions, the paged cache, and what comes between."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.batch import ForwardContext
from engine.kernels import torch_native
from engine.kernels.cpu.attention import AttentionOptions, paged_attention
from engine.kernels.cpu.kv import rotate_and_write, write_kv
from engine.kv_cache import InterleavedInt8KvCache, KvCache
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
    by_groups = _attend_by_groups(spec, index, rope_dim)
    at_once = _attend_at_once(spec, index) if backend == "cpu" else by_groups

    def attention(x_TK: Tensor, step: Step) -> Tensor:
        q, k, v = project(x_TK).split(sizes, dim=1)
        attend = at_once if isinstance(step.cache, InterleavedInt8KvCache) else by_groups
        out_THD = attend(to_q(q), to_k(k), v.view(-1, kv_heads, dim), step)
        return weights.o(out_THD.flatten(1))

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


# Queries, keys and values before their positions are known; what is attended to, [T, H, D].
_Attend = Callable[[Tensor, Tensor, Tensor, Step], Tensor]


def _attend_at_once(spec: LayerSpec, index: int) -> _Attend:
    """The whole batch on native kernels, over pages in their layout."""
    options = AttentionOptions(
        scale=spec.head_dim**-0.5 if spec.scale is None else spec.scale,
        window=spec.window,
        cap=spec.score_cap,
        slopes_H=_slopes(spec),
    )

    def attend(q_THD: Tensor, k_TJD: Tensor, v_TJD: Tensor, step: Step) -> Tensor:
        assert isinstance(step.cache, InterleavedInt8KvCache)
        pages, context = step.cache.layers[index], step.context
        if spec.rope is None:
            write_kv(k_TJD, v_TJD, context.slots_T, pages)
        else:
            turned = step.rotary[spec.rope]
            rotate_and_write(q_THD, k_TJD, v_TJD, turned, context.slots_T, pages)
        return paged_attention(q_THD, pages, context.sequences_B4, context.block_ids_P, options)

    return attend


def _attend_by_groups(spec: LayerSpec, index: int, rope_dim: int) -> _Attend:
    """Torch's attention, over what any cache reads back."""
    turn = _turn(spec, rope_dim)
    attend_group = partial(
        torch_native.attention,
        scale=spec.scale,
        window=spec.window,
        cap=spec.score_cap,
        slopes_H=_slopes(spec),
    )

    def attend(q_THD: Tensor, k_TJD: Tensor, v_TJD: Tensor, step: Step) -> Tensor:
        step.cache.write(index, turn(k_TJD, step), v_TJD, step.context.slots_T)
        return _paged_attention(turn(q_THD, step), index, step, attend_group)

    return attend


def _slopes(spec: LayerSpec) -> Tensor | None:
    return None if spec.alibi is None else alibi_slopes(spec.heads, spec.alibi)


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
