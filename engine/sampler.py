"""Logits -> token ids, vectorised over the batch.

Sampling draws one uniform number for each token, keyed by (seed, choice, position), and inverts
the cumulative distribution: a request's tokens depend on its own logits and seed alone.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.endings import NOT_FINITE
from engine.types import SamplingParams

_MASK = (1 << 64) - 1
# Tokens that a draw looks at first.
_HEAD = 256
_SLICE = 8  # neighbours of the vocabulary that are looked at together
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
        rows_RV = logits_RV if len(drawn) == len(params) else logits_RV[drawn]
        tokens_R[drawn] = _draw(rows_RV, chosen, uniform)
    return torch.where(finite_R, tokens_R, NOT_FINITE).tolist()


def _draw(logits_RV: Tensor, params: list[SamplingParams], uniform: list[float]) -> Tensor:
    """From the likeliest tokens; from all where these do not decide it: sorting them is dear."""
    tokens_R, decided_R = _draw_among(_HEAD, logits_RV, params, uniform)
    rest = (~decided_R).nonzero()[:, 0].tolist()
    if rest:
        some = [params[i] for i in rest], [uniform[i] for i in rest]
        tokens_R[rest], _ = _draw_among(logits_RV.shape[1], logits_RV[rest], *some)
    return tokens_R


def _draw_among(
    count: int, logits_RV: Tensor, params: list[SamplingParams], uniform: list[float]
) -> tuple[Tensor, Tensor]:
    """Temperature, then top-k, top-p and min-p, in the order of transformers.

    Looks at the ``count`` largest logits of a row. The second result says where all others
    would not change the token.
    """
    vocabulary = logits_RV.shape[1]
    count = min(count, vocabulary)
    largest_RK, order_RK = _largest(logits_RV, count)
    temperature = _column([p.temperature for p in params])
    # Differences to the largest logit: no temperature is too small for them.
    weights_RK = ((largest_RK - largest_RK[:, :1]) / temperature).exp()
    top_k = torch.tensor([p.top_k or vocabulary for p in params])[:, None]
    weights_RK = weights_RK.masked_fill(torch.arange(count) >= top_k, 0.0)
    total = weights_RK.sum(dim=1, keepdim=True)
    more = (top_k > count)[:, 0].nonzero()[:, 0]
    if len(more):
        total[more] = _total_weight(logits_RV, largest_RK, temperature, more)
    probabilities = weights_RK / total
    cumulative = probabilities.cumsum(dim=1)
    # top-p keeps the smallest set of tokens whose probabilities reach p; min-p those that are at
    # least p times as likely as the likeliest.
    kept = cumulative - probabilities < _column([p.top_p for p in params])
    kept &= (weights_RK >= _column([p.min_p for p in params])) & (weights_RK > 0)
    everything = torch.tensor([p.top_p >= 1 and p.min_p == 0 for p in params])[:, None]
    goes_on = kept[:, -1:] & (top_k > count)
    mass = (probabilities * kept).sum(dim=1, keepdim=True)
    point = _column(uniform) * torch.where(goes_on, 1.0, mass)
    rank = (cumulative <= point).sum(dim=1, keepdim=True)
    decided = ~goes_on | (everything & (rank < count))
    # Between the two the sum of what top-k leaves is not known.
    decided &= (top_k <= count) | (top_k >= vocabulary)
    rank = rank.minimum(kept.sum(dim=1, keepdim=True) - 1)
    # Which of equal logits are among the largest is not certain.
    decided &= (largest_RK.gather(1, rank) > largest_RK[:, -1:]) | (count == vocabulary)
    return order_RK.gather(1, rank)[:, 0], decided[:, 0]


def _total_weight(
    logits_RV: Tensor, largest_RK: Tensor, temperature_R1: Tensor, rows: Tensor
) -> Tensor:
    """float64 [rows, 1]: the sum of the weights of all tokens.

    The weights themselves are float32 here: there are many, and each is small in the sum.
    """
    if len(rows) < len(logits_RV):
        logits_RV, largest_RK = logits_RV[rows], largest_RK[rows]
        temperature_R1 = temperature_R1[rows]
    weights_RV = (logits_RV - largest_RK[:, :1]).div_(temperature_R1.float()).exp_()
    return weights_RV.sum(dim=1, keepdim=True, dtype=torch.float64)


def _largest(logits_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of each row with their columns, in descending order; of equals the first."""
    if count == logits_RV.shape[1]:
        return logits_RV.sort(dim=1, descending=True, stable=True)
    columns_RK = _largest_columns(logits_RV, count).sort(dim=1).values
    values_RK, order_RK = logits_RV.gather(1, columns_RK).sort(dim=1, descending=True, stable=True)
    return values_RK, columns_RK.gather(1, order_RK)


def _largest_columns(logits_RV: Tensor, count: int) -> Tensor:
    """int64 [R, count] in any order; which of equal ones at the end are among them is open.

    The largest lie in the ``count`` slices of neighbours whose maxima are largest: looking
    through these takes a half of the time of looking through all.
    """
    vocabulary = logits_RV.shape[1]
    slices = vocabulary // _SLICE
    if slices <= 4 * count:
        return logits_RV.topk(count, dim=1, sorted=False).indices
    rest = slices * _SLICE
    maxima_RS = logits_RV[:, :rest].unflatten(1, (slices, _SLICE)).amax(2)
    best_RK = maxima_RS.topk(count, dim=1, sorted=False).indices
    columns = (best_RK[..., None] * _SLICE + torch.arange(_SLICE)).flatten(1)
    after = torch.arange(rest, vocabulary).expand(len(logits_RV), -1)
    columns = torch.cat((columns, after), dim=1)
    values = logits_RV.gather(1, columns)
    return columns.gather(1, values.topk(count, dim=1, sorted=False).indices)


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
