"""KL of the final logits: the original against models in which some weights were rounded.

Layer by layer, with float32 activations. Shape letters: S documents, L tokens, K hidden,
V vocabulary.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from engine.blocks import Blocks

# Log-probabilities that are made at once, and those of the original that are kept in memory.
_AT_ONCE, _KEPT = 1 << 22, 1 << 26
# Tokens that run through a layer at once.
_STEP_TOKENS = 1024
# Index of a decoder layer -> its tensors that are not the original's.
Changed = Callable[[int], Mapping[str, Tensor]]


class FinalKl:
    """Holds the original's last hidden states; ``whole`` holds the text's twice beside them."""

    def __init__(self, blocks: Blocks, ids_SL: Tensor) -> None:
        self._blocks = blocks
        self._ids_SL = ids_SL
        self._layers = len(blocks.spec.layers)
        vocabulary = blocks.spec.vocabulary_size
        self._size = max(1, _AT_ONCE // (ids_SL.shape[1] * vocabulary))
        self._final_SLK = self.run(self.embedded(), 0, lambda index: {})
        kept = ids_SL.numel() * vocabulary <= _KEPT
        self._log_p = [self._log(part) for part in self._parts(self._final_SLK)] if kept else None

    @property
    def tokens(self) -> int:
        """Predictions that are compared."""
        return self._ids_SL.numel()

    def embedded(self) -> Tensor:
        """[S, L, K]: what the first layer reads."""
        return self._blocks.embed(self._ids_SL)

    @torch.inference_mode()
    def run(
        self, hidden_SLK: Tensor, begin: int, changed: Changed, end: int | None = None
    ) -> Tensor:
        """What layers ``begin`` to ``end`` (without it) make of ``hidden_SLK``, which is left."""
        found_SLK = hidden_SLK.clone()
        size = max(1, _STEP_TOKENS // hidden_SLK.shape[1])
        for index in range(begin, self._layers if end is None else end):
            layer = self._blocks.layer(index, changed(index))
            for part in found_SLK.split(size):
                part.copy_(self._blocks.run(layer, index, part.clone()))
        return found_SLK

    @torch.inference_mode()
    def of(self, final_SLK: Tensor) -> Tensor:
        """float64 [S]: KL(original || model) of the last layer's outputs, nats per token."""
        found = []
        for index, (p_SLK, q_SLK) in enumerate(
            zip(self._parts(self._final_SLK), self._parts(final_SLK), strict=True)
        ):
            log_p = self._log(p_SLK) if self._log_p is None else self._log_p[index]
            kl_SL = (log_p.exp() * (log_p - self._log(q_SLK))).sum(-1)
            found.append(kl_SL.mean(1, dtype=torch.float64))
        return torch.cat(found)

    def whole(self, changed: Changed) -> Tensor:
        """As ``of``, for the model with the layers ``changed``."""
        return self.of(self.run(self.embedded(), 0, changed))

    def _parts(self, hidden_SLK: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = hidden_SLK.split(self._size)
        return parts

    def _log(self, hidden_SLK: Tensor) -> Tensor:
        return self._blocks.logits(hidden_SLK).log_softmax(dim=-1)
