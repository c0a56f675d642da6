"""How far one model's predictions lie from another's: sums per document, then intervals."""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor

from compress.measure.figures import Entropy, Estimate, Interval, Quality
from compress.measure.intervals import Floats, ratio_estimates


@dataclass(frozen=True, slots=True)
class DocumentSums:
    """Sums over a document's predictions: negative log-likelihoods and KL in nats; the entropies
    of the original's, and their squares."""

    tokens: int
    original_nll: float
    artefact_nll: float
    kl: float
    flips: int
    entropy: float
    squared_entropy: float

    def row(self) -> list[float]:
        """The fields in order."""
        return list(astuple(self))

    @classmethod
    def from_row(cls, row: Sequence[float]) -> "DocumentSums":
        """Inverse of ``row``."""
        tokens, original_nll, artefact_nll, kl, flips, *entropies = row
        return cls(int(tokens), original_nll, artefact_nll, kl, int(flips), *entropies)

    @property
    def original_is_finite(self) -> bool:
        """Whether the original's predictions are numbers."""
        return math.isfinite(self.original_nll)

    @property
    def finite(self) -> bool:
        """Whether those of both are."""
        return math.isfinite(self.kl) and math.isfinite(self.artefact_nll)


def compare(original_TV: Tensor, artefact_TV: Tensor, ids_T: Tensor) -> DocumentSums:
    """Logits of the same tokens; row i predicts token i + 1, so the last row is left out."""
    log_p_TV = torch.log_softmax(original_TV[:-1].float(), dim=-1)
    log_q_TV = torch.log_softmax(artefact_TV[:-1].float(), dim=-1)
    next_T1 = ids_T[1:, None]
    entropy_T = torch.special.entr(log_p_TV.exp()).sum(dim=-1, dtype=torch.float64)
    return DocumentSums(
        tokens=len(next_T1),
        original_nll=-float(log_p_TV.gather(1, next_T1).sum(dtype=torch.float64)),
        artefact_nll=-float(log_q_TV.gather(1, next_T1).sum(dtype=torch.float64)),
        kl=float((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(dtype=torch.float64)),
        flips=int((log_p_TV.argmax(dim=-1) != log_q_TV.argmax(dim=-1)).sum()),
        entropy=float(entropy_T.sum()),
        squared_entropy=float(entropy_T.square().sum()),
    )


def summarise(documents: Sequence[DocumentSums]) -> tuple[Quality, Estimate]:
    """Figures over all tokens, with intervals over documents; and the KL for the gate."""
    columns = {name: _column(documents, name) for name in DocumentSums.__dataclass_fields__}
    tokens_D = columns["tokens"]
    lost_D = columns["artefact_nll"] - columns["original_nll"]
    loss, kl, flips = ratio_estimates([lost_D, columns["kl"], columns["flips"]], tokens_D)
    quality = Quality(
        tokens=int(tokens_D.sum()),
        original_perplexity=_perplexity(columns["original_nll"], tokens_D),
        artefact_perplexity=_perplexity(columns["artefact_nll"], tokens_D),
        perplexity_ratio=Interval(*map(_exp, (loss.value, loss.low, loss.high))),
        kl=_interval(kl),
        flips=_interval(flips, most=1.0),
    )
    return quality, kl


def entropy(documents: Sequence[DocumentSums]) -> Entropy:
    """Over all tokens."""
    tokens = sum(one.tokens for one in documents)
    mean = sum(one.entropy for one in documents) / tokens
    variance = sum(one.squared_entropy for one in documents) / tokens - mean**2
    return Entropy(mean=mean, deviation=math.sqrt(max(0.0, variance)))


def _column(documents: Sequence[DocumentSums], name: str) -> Floats:
    return np.array([getattr(document, name) for document in documents], np.float64)


def _interval(estimate: Estimate, most: float = math.inf) -> Interval:
    """A share and a divergence are never below 0, and a share is not above 1."""
    return Interval(estimate.value, max(0.0, estimate.low), min(most, estimate.high))


def _perplexity(nll_D: Floats, tokens_D: Floats) -> float:
    return _exp(float(nll_D.sum() / tokens_D.sum()))


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # a ruined model's loss must not overflow
