"""The native sampler and its log-probabilities."""

import ctypes
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.cpu.library import address, kernels
from engine.kernels.cpu.memory import scratch
from engine.kernels.torch_sampling import Logprobs
from engine.types import SamplingParams

# ``Draw`` of csrc/sample.cpp.
_DRAW = struct.Struct("=dddqQQQ")
_MASK = (1 << 64) - 1


class SampleArgs(ctypes.Structure):
    """``SampleArgs`` of csrc/sample.cpp."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("draws", ctypes.c_char_p),
        ("tokens", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("edited", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


class LogprobsArgs(ctypes.Structure):
    """``LogprobsArgs`` of csrc/logprobs.cpp."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("own", ctypes.c_void_p),
        ("rank", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


def sample(
    logits_RV: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    choices: Sequence[int],
    *,
    edited: bool,
) -> list[int]:
    """See ``reference.sample``."""
    assert logits_RV.dtype == torch.float32
    rows, columns = logits_RV.shape
    draws = b"".join(
        _DRAW.pack(p.temperature, p.top_p, p.min_p, p.top_k, p.seed & _MASK, position, choice)
        for p, position, choice in zip(params, positions, choices, strict=True)
    )
    tokens_R = (ctypes.c_int32 * rows)()
    threads = torch.get_num_threads()
    (space,) = scratch(threads * 3 * (columns + 32) * 4)
    args = SampleArgs(
        address(logits_RV), draws, ctypes.addressof(tokens_R), space, rows, columns, edited, threads
    )
    kernels().sample(ctypes.byref(args))
    return list(tokens_R)


def logprobs(logits_RV: Tensor, tokens: list[int], count: int) -> Logprobs:
    """See ``torch_sampling.logprobs``."""
    assert logits_RV.dtype == torch.float32
    rows, columns = logits_RV.shape
    assert 0 <= min(tokens) <= max(tokens) < columns
    assert count <= columns
    tokens_R = torch.tensor(tokens, dtype=torch.int32)
    own_R, rank_R = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
    values_RC, ids_RC = torch.empty(rows, count), torch.empty(rows, count, dtype=torch.int32)
    tensors = (logits_RV, tokens_R, own_R, rank_R, values_RC, ids_RC)
    places = [address(tensor) for tensor in tensors]
    args = LogprobsArgs(*places, rows, columns, count, torch.get_num_threads())
    kernels().logprobs(ctypes.byref(args))
    return Logprobs(own_R.tolist(), rank_R.tolist(), values_RC.tolist(), ids_RC.tolist())
