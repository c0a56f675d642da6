"""The two ends of a decoder: token ids -> hidden state, and what is done to logits."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from engine.models.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """Token ids [T] and positions [T] -> float32 [T, K]."""

    lookup: Callable[[Tensor], Tensor]
    scale: float = 1.0
    positions_SK: Tensor | None = None

    def __call__(self, ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """Scaled token embeddings plus learned positions, where the model has them."""
        hidden_TK = self.lookup(ids_T)
        if self.scale != 1.0:
            hidden_TK = hidden_TK * self.scale
        if self.positions_SK is None:
            return hidden_TK
        return hidden_TK + self.positions_SK[positions_T]


def finish_logits(logits_RV: Tensor, spec: ModelSpec) -> Tensor:
    """Logits divided and softly capped, as the model asks for."""
    if spec.logit_divisor != 1.0:
        logits_RV = logits_RV / spec.logit_divisor
    if spec.logit_cap is None:
        return logits_RV
    return (logits_RV / spec.logit_cap).tanh_().mul_(spec.logit_cap)
