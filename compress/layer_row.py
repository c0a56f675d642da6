"""A compressed linear as it is written: its tensors, and its row in the manifest."""

import torch
from torch import Tensor

from compress.block import LinearResult
from compress.manifest import LayerRow
from compress.treatment import Treatment
from engine.formats import float_quantized, int_quantized, pack_quantized, sparse
from engine.formats.float_quantized import Float8Weight
from engine.formats.int_quantized import Int8Weight

_BASELINES = ("rtn", "magnitude", "magnitude+rtn")


def pack_linear(
    name: str, treatment: Treatment, result: LinearResult, *, transposed: bool, dtype: torch.dtype
) -> tuple[dict[str, Tensor], LayerRow]:
    """Tensors by full name. Weights that were only pruned or scaled keep ``dtype``."""
    weight = result.weight
    if isinstance(weight, Tensor):
        dense = weight.to(dtype)
        tensors = {"weight": dense.t().contiguous() if transposed else dense}
    elif isinstance(weight, Float8Weight):
        tensors = float_quantized.pack(weight, transposed=transposed)
    elif treatment.sparse is not None:
        packed = treatment.format != int_quantized.FORMAT
        tensors = sparse.pack(weight, treatment.sparse, packed=packed)
    elif treatment.format == int_quantized.FORMAT:
        assert isinstance(weight, Int8Weight)
        tensors = int_quantized.pack(weight, transposed=transposed)
    else:
        tensors = pack_quantized.pack(weight)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    shape = (weight if isinstance(weight, Tensor) else weight.q_NK).shape
    last = result.outcomes[-1] if result.outcomes else None
    baseline = None
    if last is not None:
        baseline = next((last.errors[b] for b in _BASELINES if b in last.errors), None)
    rungs = [outcome.rung for outcome in result.outcomes if outcome.rung is not None]
    row = LayerRow(
        name=name,
        storage=treatment.storage,
        execution=treatment.execution,
        method="+".join(dict.fromkeys(one.type for one in treatment.modifiers)),
        bits=round(8 * nbytes / shape.numel(), 4),
        bytes=nbytes,
        # The last digits of a sum depend on the number of threads.
        relative_error=_digits(result.relative_error),
        clipped_share=_digits(result.clipped_share),
        kept="+".join(outcome.method for outcome in result.outcomes) or None,
        output_error=_digits(None if last is None else last.error),
        baseline_error=_digits(baseline),
        damping=rungs[-1] if rungs else None,
        sparsity_wanted=treatment.sparsity,
        sparsity=_digits(result.sparsity) if treatment.pruner else None,
        note=_note(treatment, shape),
    )
    return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}, row


def _note(treatment: Treatment, shape: torch.Size) -> str | None:
    if not treatment.fell_back:
        return None
    assert treatment.quantiser is not None
    group = treatment.quantiser.group_size
    return f"8 bits, for groups of {group} do not divide rows of {shape[-1]}"


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
