"""Attention of a whole batch over INT8 pages, native. Structures mirror attention.h."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.cpu.kv import KvPages, rows_of
from engine.kernels.cpu.library import address, kernels
from engine.kernels.cpu.memory import scratch


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOptions:
    """As those of ``reference.attention``, the scale given."""

    scale: float
    window: int | None = None
    cap: float | None = None
    slopes_H: Tensor | None = None


class _AttentionArgs(ctypes.Structure):
    _fields_ = (
        ("kv", KvPages),
        ("q", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("sequences", ctypes.c_void_p),
        ("block_ids", ctypes.c_void_p),
        ("slopes", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("q_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("sequence_count", ctypes.c_int64),
        ("scratch_bytes", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
    )


def paged_attention(
    q_THD: Tensor,
    pages: KvPages,
    sequences_B4: Tensor,
    block_ids_P: Tensor,
    options: AttentionOptions,
) -> Tensor:
    """Causal grouped-query attention, float32 [T, H, D]; see ``reference.int8_attention``.

    Args:
        q_THD: float32 queries of all sequences' rows; may be a slice of wider rows.
        pages: where the keys and values are, those of these rows among them.
        sequences_B4, block_ids_P: int32, as in ``ForwardContext``.
        options: of the scores.
    """
    assert sequences_B4.dtype == block_ids_P.dtype == torch.int32
    tokens, heads, dim = q_THD.shape
    assert dim == pages.head_dim
    out_THD = torch.empty(tokens, heads, dim)
    start, stride = rows_of(q_THD)
    args = _AttentionArgs(
        kv=pages,
        q=start,
        out=address(out_THD),
        sequences=address(sequences_B4),
        block_ids=address(block_ids_P),
        slopes=None if options.slopes_H is None else address(options.slopes_H),
        q_stride=stride,
        out_stride=heads * dim,
        sequence_count=len(sequences_B4),
        threads=torch.get_num_threads(),
        heads=heads,
        window=options.window or 0,
        scale=options.scale,
        cap=options.cap or 0.0,
    )
    native = kernels()
    native.attention_scratch(ctypes.byref(args))
    (args.scratch,) = scratch(args.scratch_bytes)
    native.attention(ctypes.byref(args))
    return out_THD
