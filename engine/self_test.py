"""Start-up check: each loaded layer's kernel against its reference, on its own weights."""

import torch

from engine.errors import ModelLoadError
from engine.kernels import reference
from engine.layers.linear import DenseLinear, Int4Linear, Int8Linear, Linear, Split

# Out-features that are compared: the reference is slow, and a broken kernel fails everywhere.
_COMPARED = 64


def check_linear(linear: Linear) -> None:
    """Raises ``ModelLoadError`` where kernel and reference differ; integer products at all."""
    if isinstance(linear, Split):
        for part in linear.parts:
            check_linear(part)
        return
    for rows in (1, 3):
        if isinstance(linear, Int8Linear):
            x_MK = _inputs(rows, linear.q_NK.shape[1])
            q_NK, scale_N = linear.q_NK[:_COMPARED], linear.scale_N[:_COMPARED]
            wanted = _biased(reference.int8_linear(x_MK, q_NK, scale_N), linear.bias_N)
            equal = torch.equal(linear(x_MK)[:, :_COMPARED], wanted)
        elif isinstance(linear, Int4Linear):
            x_MK = _inputs(rows, linear.q_NK.shape[1])
            zero_NG = None if linear.zero_NG is None else linear.zero_NG[:_COMPARED]
            q_NK, scale_NG = linear.q_NK[:_COMPARED], linear.scale_NG[:_COMPARED]
            product = reference.int4_linear(x_MK, q_NK, scale_NG, zero_NG)
            wanted = _biased(product, linear.bias_N)
            equal = torch.equal(linear(x_MK)[:, :_COMPARED], wanted)
        else:
            assert isinstance(linear, DenseLinear)
            x_MK = _inputs(rows, linear.weight_NK.shape[1])
            product = reference.dense_linear(x_MK, linear.weight_NK[:_COMPARED])
            wanted = _biased(product, linear.bias_N)
            found = linear(x_MK)[:, :_COMPARED]
            equal = torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
        if not equal:
            raise ModelLoadError(
                f"self-test: the {linear.storage} kernel computes wrong results on this machine"
            )


def _biased(out_MN: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    return out_MN if bias_N is None else out_MN + bias_N[:_COMPARED]


def _inputs(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=generator)
