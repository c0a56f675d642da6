"""Logits -> token ids, vectorised over the batch.

Sampling draws one uniform number for each token, keyed by (seed, choice, position), and inverts
the cumulative distribution: a request's tokens depend on its own logits and seed alone.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.types import SamplingParams

_MASK = (1 << 64) - 1
NOT_FINITE = -1
# Changes logits in place: penalties, or -inf for tokens that are not allowed.
Edit = Callable[[Tensor], None]


def sample(
    logits_RV: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    choices: Sequence[int] | None = None,
    edit: Edit = lambda logits_RV: None,
) -> list[int]:
    """The next token of each row; ``NOT_FINITE`` for a row with NaN or infinite logits, or one
    of which ``edit`` leaves nothing.

    ``positions[i]`` is the number of tokens that row i has generated before, ``choices[i]``
    which choice of its request it is.
    """
    # One sum finds NaN and infinity in a row (finite logits cannot overflow float32 here).
    finite_R = torch.isfinite(logits_RV.sum(dim=1))
    edit(logits_RV)
    tokens_R = logits_RV.argmax(dim=1)
    finite_R &= logits_RV.gather(1, tokens_R[:, None])[:, 0] > -torch.inf
    finite = finite_R.tolist()
    drawn = [i for i, p in enumerate(params) if p.temperature > 0 and finite[i]]
    if drawn:
        chosen = [params[i] for i in drawn]
        choice = choices or [0] * len(params)
        uniform = [uniform_number(params[i].seed, positions[i], choice[i]) for i in drawn]
        tokens_R[drawn] = _draw(logits_RV[drawn], chosen, uniform)
    return torch.where(finite_R, tokens_R, NOT_FINITE).tolist()


def _draw(logits_RV: Tensor, params: list[SamplingParams], uniform: list[float]) -> Tensor:
    """Temperature, then top-k, top-p and min-p, in the order of transformers."""
    sorted_RV, order_RV = logits_RV.sort(dim=1, descending=True, stable=True)
    # Differences to the largest logit: no temperature is too small for them.
    sorted_RV = (sorted_RV - sorted_RV[:, :1]) / _column([p.temperature for p in params])
    vocabulary = logits_RV.shape[1]
    top_k = torch.tensor([p.top_k or vocabulary for p in params])[:, None]
    sorted_RV = sorted_RV.masked_fill(torch.arange(vocabulary) >= top_k, -torch.inf)
    probabilities = sorted_RV.softmax(dim=1)
    cumulative = probabilities.cumsum(dim=1)
    # top-p keeps the smallest set of tokens whose probabilities reach p; min-p those that are at
    # least p times as likely as the likeliest.
    kept = cumulative - probabilities < _column([p.top_p for p in params])
    kept &= sorted_RV >= _column([p.min_p for p in params]).log()
    kept &= sorted_RV > -torch.inf
    total = (probabilities * kept).sum(dim=1, keepdim=True)
    point = _column(uniform) * total
    rank = (cumulative <= point).sum(dim=1, keepdim=True)
    rank = rank.minimum(kept.sum(dim=1, keepdim=True) - 1)
    return order_RV.gather(1, rank)[:, 0]


def _column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def uniform_number(seed: int, position: int, choice: int = 0) -> float:
    """In [0, 1), from its arguments alone: rounds of splitmix64 (Steele et al. 2014)."""
    if choice:
        seed = _splitmix64((seed & _MASK) ^ _splitmix64(choice))
    state = _splitmix64((_splitmix64(seed & _MASK) + position) & _MASK)
    return (state >> 11) / float(1 << 53)


def _splitmix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
