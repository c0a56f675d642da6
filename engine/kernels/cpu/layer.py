"""The structures of csrc/layer.h, and its two calls."""

import ctypes

from engine.kernels.cpu.grouped import GroupedWeights
from engine.kernels.cpu.kv import KvPages
from engine.kernels.cpu.linear import Int8Weights
from engine.kernels.cpu.norm import Norm


class Matrix(ctypes.Structure):
    """``Matrix``: one of the two is set."""

    _fields_ = (("int8", Int8Weights), ("grouped", GroupedWeights))


class Layer(ctypes.Structure):
    """``Layer``; what it points to belongs to whoever fills it in."""

    _fields_ = (
        ("attention_norm", Norm),
        ("attention_out_norm", Norm),
        ("attention_sum_norm", Norm),
        ("mlp_norm", Norm),
        ("mlp_out_norm", Norm),
        ("mlp_sum_norm", Norm),
        ("q_norm", Norm),
        ("k_norm", Norm),
        ("qkv", Matrix),
        ("o", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("slopes", ctypes.c_void_p),
        ("function", ctypes.c_int64),
        ("gated", ctypes.c_int64),
        ("parallel", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("rope_dim", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
        ("qkv_clip", ctypes.c_float),
        ("residual_scale", ctypes.c_float),
    )


class LayerStep(ctypes.Structure):
    """``LayerStep``."""

    _fields_ = (
        ("layer", ctypes.c_void_p),
        ("kv", KvPages),
        ("hidden", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("sequences", ctypes.c_void_p),
        ("block_ids", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("sequence_count", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )
