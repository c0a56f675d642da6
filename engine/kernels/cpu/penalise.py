"""The native form of penalties."""

import ctypes
import struct
from array import array
from collections.abc import Sequence as Many

import torch
from torch import Tensor

from engine.kernels.cpu.library import address, kernels
from engine.kernels.cpu.memory import scratch
from engine.penalties import is_penalised
from engine.types import Sequence

# ``Penalty`` of csrc/penalise.cpp.
_PENALTY = struct.Struct("=QQqqqffff")


class PenaliseArgs(ctypes.Structure):
    """``PenaliseArgs`` of csrc/penalise.cpp."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("penalties", ctypes.c_char_p),
        ("scratch", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


def penalise(logits_RV: Tensor, sequences: Many[Sequence]) -> None:
    """See ``engine.penalties.penalise``."""
    assert logits_RV.dtype == torch.float32
    columns, threads = logits_RV.shape[1], torch.get_num_threads()
    penalties, kept = [], []
    for row, sequence in enumerate(sequences):
        if is_penalised(sequence.request.sampling):
            penalty, tokens = _penalty(row, sequence)
            penalties.append(penalty)
            kept.append(tokens)  # the penalty holds addresses of them
    if penalties:
        (space,) = scratch(threads * columns * 4)
        packed = b"".join(penalties)
        args = PenaliseArgs(address(logits_RV), packed, space, len(penalties), columns, threads)
        kernels().penalise(ctypes.byref(args))


def _penalty(row: int, sequence: Sequence) -> tuple[bytes, tuple["array[int]", "array[int]"]]:
    params, length = sequence.request.sampling, len(sequence.request.prompt)
    generated = array("i", sequence.tokens[length:])
    # The others count what was generated only.
    prompt = array("i", sequence.request.prompt if params.repetition_penalty != 1.0 else ())
    packed = _PENALTY.pack(
        prompt.buffer_info()[0],
        generated.buffer_info()[0],
        len(prompt),
        len(generated),
        row,
        params.repetition_penalty,
        params.frequency_penalty,
        params.presence_penalty,
        0.0,
    )
    return packed, (prompt, generated)
