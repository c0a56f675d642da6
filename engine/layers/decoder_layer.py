"""One decoder layer, composed of single kernels: ``(hidden, step) -> hidden``."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.batch import ForwardContext
from engine.kernels import kernel
from engine.kv_cache import KvCache
from engine.layers.linear import Linear
from engine.layers.rotary import rotate
from engine.models.spec import LayerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """Matrices and norms of one layer; q, k, v and gate, up are fused by their out-features."""

    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    attention_norm_K: Tensor
    mlp_norm_K: Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one step share."""

    context: ForwardContext
    cache: KvCache
    cos_T1D: Tensor
    sin_T1D: Tensor


LayerFn = Callable[[Tensor, Step], Tensor]


def compose(spec: LayerSpec, weights: LayerWeights, index: int, backend: str) -> LayerFn:
    """The layer as a function; ``index`` is its place in the KV cache."""
    norm, attend = kernel("rms_norm", backend), kernel("attention", backend)
    q_size, kv_size = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim

    def attention(x_TK: Tensor, step: Step) -> Tensor:
        q, k, v = weights.qkv(x_TK).split((q_size, kv_size, kv_size), dim=1)
        q_THD = rotate(q.view(-1, spec.heads, spec.head_dim), step.cos_T1D, step.sin_T1D)
        k_TJD = rotate(k.view(-1, spec.kv_heads, spec.head_dim), step.cos_T1D, step.sin_T1D)
        v_TJD = v.view(-1, spec.kv_heads, spec.head_dim)
        step.cache.write(index, k_TJD, v_TJD, step.context.slots_T)
        return weights.o(_paged_attention(q_THD, index, step, attend).flatten(1))

    def mlp(x_TK: Tensor) -> Tensor:
        gate, up = weights.gate_up(x_TK).chunk(2, dim=1)
        return weights.down(F.silu(gate).mul_(up))

    def layer(hidden_TK: Tensor, step: Step) -> Tensor:
        normed = norm(hidden_TK, weights.attention_norm_K, spec.norm_eps)
        hidden_TK = hidden_TK + attention(normed, step)
        return hidden_TK + mlp(norm(hidden_TK, weights.mlp_norm_K, spec.norm_eps))

    return layer


def _paged_attention(
    q_THD: Tensor, layer: int, step: Step, attend: Callable[..., Tensor]
) -> Tensor:
    """Decoding sequences in one call, prompts' chunks one by one."""
    context = step.context
    decodes = context.num_decodes
    groups = [(0, decodes, 1)] if decodes else []
    groups += [(i, i + 1, context.query_lens[i]) for i in range(decodes, len(context.query_lens))]
    outputs, row = [], 0
    for begin, end, length in groups:
        lens_B = torch.tensor(context.context_lens[begin:end])
        k, v = step.cache.read(layer, context.block_tables_BP[begin:end], lens_B)
        rows = (end - begin) * length
        q_BLHD = q_THD[row : row + rows].unflatten(0, (end - begin, length))
        outputs.append(attend(q_BLHD, k, v, lens_B).flatten(0, 1))
        row += rows
    return torch.cat(outputs)
