"""Native norms, and the phases that quantise what goes into an integer product."""

import ctypes

import torch
from torch import Tensor

from engine.kernels.cpu.library import address, kernels
from engine.kernels.cpu.linear import Activations

# The order is that of Function in csrc/gate.h.
FUNCTIONS = ("silu", "gelu", "gelu_tanh", "relu")


class Norm(ctypes.Structure):
    """``Norm`` of csrc/norm.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
        ("eps", ctypes.c_double),
        ("rms", ctypes.c_int64),
    )


class NormArgs(ctypes.Structure):
    """``NormArgs`` of csrc/norm.cpp."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("norm", Norm),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


class NormQuantizeArgs(ctypes.Structure):
    """``NormQuantizeArgs`` of csrc/norm.cpp."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("norm", Norm),
        ("activations", Activations),
        ("threads", ctypes.c_int64),
    )


class ActivateQuantizeArgs(ctypes.Structure):
    """``ActivateQuantizeArgs`` of csrc/norm.cpp."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("function", ctypes.c_int64),
        ("gated", ctypes.c_int64),
        ("activations", Activations),
        ("threads", ctypes.c_int64),
    )


class ActivateArgs(ctypes.Structure):
    """``ActivateArgs`` of csrc/norm.cpp."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("function", ctypes.c_int64),
        ("gated", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


def activation(x_MK: Tensor, function: str, *, gated: bool) -> Tensor:
    """See ``reference.activation``; changes ``x_MK``, and returns a part of it."""
    assert x_MK.dtype == torch.float32
    rows, width = x_MK.shape
    columns = width // 2 if gated else width
    place, threads = FUNCTIONS.index(function), torch.get_num_threads()
    args = ActivateArgs(address(x_MK), place, gated, rows, columns, threads)
    kernels().activate(ctypes.byref(args))
    return x_MK[:, :columns]


def rms_norm(x_MK: Tensor, weight_K: Tensor, eps: float) -> Tensor:
    """See ``reference.rms_norm``; a row's result is the same in any batch."""
    return _run(x_MK, Norm(address(weight_K), None, len(weight_K), eps, 1))


def layer_norm(x_MK: Tensor, weight_K: Tensor, bias_K: Tensor | None, eps: float) -> Tensor:
    """See ``reference.layer_norm``; a row's result is the same in any batch."""
    bias = None if bias_K is None else address(bias_K)
    return _run(x_MK, Norm(address(weight_K), bias, len(weight_K), eps, 0))


def _run(x: Tensor, norm: Norm) -> Tensor:
    x = x.contiguous()
    assert x.dtype == torch.float32
    assert x.shape[-1] == norm.columns
    out = torch.empty_like(x)
    rows = x.numel() // x.shape[-1]
    if rows:
        args = NormArgs(address(x), norm, address(out), rows, torch.get_num_threads())
        kernels().norm(ctypes.byref(args))
    return out
