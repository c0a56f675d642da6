"""Rotary positions and the writing of INT8 pages, native. Structures mirror rope.h and kv.h."""

import ctypes

import torch
from torch import Tensor

from engine.kernels.cpu.library import address, kernels


class KvPages(ctypes.Structure):
    """One layer's pages; their owner keeps the tensors alive."""

    _fields_ = (
        ("pages", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("block_size", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("padded_dim", ctypes.c_int32),
    )


class _RopeArgs(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("dim", ctypes.c_int32),
    )


class _KvWriteArgs(ctypes.Structure):
    _fields_ = (
        ("kv", KvPages),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("key_stride", ctypes.c_int64),
        ("value_stride", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
    )


class _KvStepArgs(ctypes.Structure):
    _fields_ = (
        ("q", _RopeArgs),
        ("k", _RopeArgs),
        ("write", _KvWriteArgs),
        ("threads", ctypes.c_int64),
    )


def write_kv(k_TJD: Tensor, v_TJD: Tensor, slots_T: Tensor, pages: KvPages) -> None:
    """Rounds float32 keys and values and stores them at ``slots_T``."""
    none = _RopeArgs()
    _run(_KvStepArgs(none, none, _write_args(k_TJD, v_TJD, slots_T, pages)))


def rotate_and_write(
    q_THD: Tensor,
    k_TJD: Tensor,
    v_TJD: Tensor,
    rotary: tuple[Tensor, Tensor],
    slots_T: Tensor,
    pages: KvPages,
) -> None:
    """Turns ``q`` and ``k`` in place by ``rotary`` (cos, sin [T, 1, R]), then as ``write_kv``.

    Bit for bit as ``layers.rotary.rotate_part``. Tensors may be slices of wider rows.
    """
    turns = (_rope_args(q_THD, *rotary), _rope_args(k_TJD, *rotary))
    _run(_KvStepArgs(*turns, _write_args(k_TJD, v_TJD, slots_T, pages)))


def rows_of(x_THD: Tensor) -> tuple[int, int]:
    """Address, and floats from one row to the next, of float32 rows of whole heads."""
    assert x_THD.dtype == torch.float32
    assert x_THD.stride()[1:] == (x_THD.shape[2], 1)
    return x_THD.data_ptr(), x_THD.stride(0)


def _rope_args(x_THD: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> _RopeArgs:
    tokens, heads, head_dim = x_THD.shape
    start, stride = rows_of(x_THD)
    tables = address(cos_T1R), address(sin_T1R)
    return _RopeArgs(start, *tables, stride, tokens, heads, head_dim, cos_T1R.shape[-1])


def _write_args(k_TJD: Tensor, v_TJD: Tensor, slots_T: Tensor, pages: KvPages) -> _KvWriteArgs:
    assert slots_T.dtype == torch.int64
    assert k_TJD.shape == v_TJD.shape == (len(slots_T), pages.kv_heads, pages.head_dim)
    (keys, key_stride), (values, value_stride) = rows_of(k_TJD), rows_of(v_TJD)
    strides = key_stride, value_stride
    return _KvWriteArgs(pages, keys, values, address(slots_T), *strides, len(slots_T))


def _run(args: _KvStepArgs) -> None:
    args.threads = torch.get_num_threads()
    kernels().kv_step(ctypes.byref(args))
