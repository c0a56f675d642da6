"""Start-up check: each loaded layer's kernel against its reference, on its own weights."""

import torch

from engine.errors import ModelLoadError
from engine.kernels import reference
from engine.kernels.cpu.grouped import PackedGroupedLinear
from engine.kernels.cpu.linear import PackedInt8Linear
from engine.layers.float8 import Float8Linear
from engine.layers.linear import DenseLinear, Int4Linear, Int8Linear, Linear, Reordered, Split

# Out-features that are compared: the reference is slow, and a broken kernel fails everywhere.
_COMPARED = 64


def check_linear(linear: Linear) -> None:
    """Raises ``ModelLoadError`` where kernel and reference differ; exact products at all."""
    if isinstance(linear, Split):
        for part in linear.parts:
            check_linear(part)
        return
    if isinstance(linear, Reordered):
        check_linear(linear.linear)
        return
    assert isinstance(linear, _Single)
    for rows in (1, 3, 13):
        x_MK = _inputs(rows, _columns(linear))
        wanted = _biased(_reference(linear, x_MK), linear.bias_N)
        found = linear(x_MK)[:, :_COMPARED]
        if linear.execution.endswith(("int8", "e4m3")):
            equal = torch.equal(found, wanted)
        else:
            equal = torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
        if not equal:
            raise ModelLoadError(
                f"self-test: the {linear.storage} kernel computes wrong results on this machine"
            )


_Single = (
    DenseLinear | Float8Linear | Int4Linear | Int8Linear | PackedInt8Linear | PackedGroupedLinear
)


def _columns(linear: _Single) -> int:
    match linear:
        case DenseLinear():
            return linear.weight_NK.shape[1]
        case Int4Linear() | Float8Linear():
            return linear.weight.q_NK.shape[1]
        case _:
            return linear.columns


def _reference(linear: _Single, x_MK: torch.Tensor) -> torch.Tensor:
    """Of the first out-features, without bias."""
    match linear:
        case DenseLinear():
            return reference.dense_linear(x_MK, linear.weight_NK[:_COMPARED])
        case Float8Linear():
            return reference.float8_linear(x_MK, linear.weight.rows(slice(_COMPARED)))
        case Int4Linear():
            rows = linear.weight.rows(torch.arange(min(_COMPARED, len(linear.weight.q_NK))))
            return reference.int4_linear(x_MK, rows)
        case PackedGroupedLinear():
            rows = linear.rows(torch.arange(min(_COMPARED, linear.outs)))
            multiply = reference.int4_linear
            if linear.activations == "float32":
                multiply = reference.weight_only_linear
            return multiply(x_MK, rows)
        case _:
            weight = linear.rows(torch.arange(min(_COMPARED, linear.outs)))
            return reference.int8_linear(x_MK, weight.q_NK, weight.scale_N)


def _biased(out_MN: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    return out_MN if bias_N is None else out_MN + bias_N[: out_MN.shape[1]]


def _inputs(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=generator)
