"""Norms: a kernel with its weights, ``x -> x`` over the last dimension."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from engine.kernels import kernel
from engine.models.spec import NormSpec

Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedNorm:
    """RMSNorm or LayerNorm with float32 weights; an RMSNorm has no bias."""

    kind: Literal["rms", "layer"]
    weight_K: Tensor
    bias_K: Tensor | None
    eps: float
    kernel: Callable[..., Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """See ``reference.rms_norm`` and ``reference.layer_norm``."""
        if self.kind == "rms":
            return self.kernel(x, self.weight_K, self.eps)
        return self.kernel(x, self.weight_K, self.bias_K, self.eps)


def make_norm(spec: NormSpec, weight_K: Tensor, bias_K: Tensor | None, backend: str) -> Norm:
    """The norm with float32 weights; ``spec.offset`` is added to them here."""
    return WeightedNorm(
        kind=spec.kind,
        weight_K=weight_K + spec.offset if spec.offset else weight_K,
        bias_K=bias_K,
        eps=spec.eps,
        kernel=kernel(f"{spec.kind}_norm", backend),
    )


def identity(x: Tensor) -> Tensor:
    """No norm."""
    return x
