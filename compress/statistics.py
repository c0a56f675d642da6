"""How far one model's predictions lie from another's: sums per document, then intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95 % bootstrap interval over documents."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class DocumentSums:
    """Sums over a document's predictions: negative log-likelihoods and KL in nats."""

    tokens: int
    original_nll: float
    artefact_nll: float
    kl: float
    flips: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """``tokens`` counts predictions; ``kl`` is the mean of KL(original || artefact) in nats,
    ``flips`` the share of predictions whose most likely token changed.
    """

    tokens: int
    original_perplexity: float
    artefact_perplexity: float
    perplexity_ratio: Interval
    kl: Interval
    flips: Interval


def compare(original_TV: Tensor, artefact_TV: Tensor, ids_T: Tensor) -> DocumentSums:
    """Logits of the same tokens; row i predicts token i + 1, so the last row is left out."""
    log_p_TV = torch.log_softmax(original_TV[:-1].float(), dim=-1)
    log_q_TV = torch.log_softmax(artefact_TV[:-1].float(), dim=-1)
    next_T1 = ids_T[1:, None]
    return DocumentSums(
        tokens=len(next_T1),
        original_nll=-float(log_p_TV.gather(1, next_T1).sum(dtype=torch.float64)),
        artefact_nll=-float(log_q_TV.gather(1, next_T1).sum(dtype=torch.float64)),
        kl=float((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(dtype=torch.float64)),
        flips=int((log_p_TV.argmax(dim=-1) != log_q_TV.argmax(dim=-1)).sum()),
    )


def summarise(documents: Sequence[DocumentSums], *, seed: int = 0) -> Quality:
    """Figures over all tokens; the bootstrap draws documents, whose tokens hang together."""
    columns = np.array(
        [(d.tokens, d.original_nll, d.artefact_nll, d.kl, d.flips) for d in documents], np.float64
    )
    totals = columns.sum(axis=0)
    draws = np.random.default_rng(seed).integers(len(columns), size=(_RESAMPLES, len(columns)))
    resampled = np.stack([columns[rows].sum(axis=0) for rows in draws])

    def interval(numerator: NDArray[np.float64], samples: NDArray[np.float64]) -> Interval:
        low, high = np.quantile(samples / resampled[:, 0], [0.025, 0.975])
        return Interval(float(numerator / totals[0]), float(low), float(high))

    loss = interval(totals[2] - totals[1], resampled[:, 2] - resampled[:, 1])
    return Quality(
        tokens=int(totals[0]),
        original_perplexity=math.exp(totals[1] / totals[0]),
        artefact_perplexity=math.exp(totals[2] / totals[0]),
        perplexity_ratio=Interval(*map(math.exp, (loss.value, loss.low, loss.high))),
        kl=interval(totals[3], resampled[:, 3]),
        flips=interval(totals[4], resampled[:, 4]),
    )
