"""Norms: a kernel with its weights, ``x -> x`` over the last dimension."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from engine.kernels import kernel
from engine.models.spec import NormSpec

Norm = Callable[[Tensor], Tensor]


def make_norm(spec: NormSpec, weight_K: Tensor, bias_K: Tensor | None, backend: str) -> Norm:
    """The norm with float32 weights; ``spec.offset`` is added to them here."""
    if spec.offset:
        weight_K = weight_K + spec.offset
    if spec.kind == "rms":
        return partial(kernel("rms_norm", backend), weight_K=weight_K, eps=spec.eps)
    layer_norm = kernel("layer_norm", backend)
    return partial(layer_norm, weight_K=weight_K, bias_K=bias_K, eps=spec.eps)


def identity(x: Tensor) -> Tensor:
    """No norm."""
    return x
