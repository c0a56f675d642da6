"""Sampling and log-probabilities of torch's own operations, vectorised over the rows."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.endings import NOT_FINITE
from engine.kernels.reference import TEMPERATURES
from engine.types import SamplingParams
from engine.uniform import uniform_number

# Tokens that a cut looks at first: sorting all of them is dear.
_HEAD = 256
_SLICE = 8  # neighbours of the vocabulary that are looked at together


class Logprobs(NamedTuple):
    """By row: a token's log-probability, its rank, and those of the likeliest with their ids."""

    own: list[float]
    rank: list[int]
    values: list[list[float]]
    ids: list[list[int]]


def logprobs(logits_RV: Tensor, tokens: list[int], count: int) -> Logprobs:
    """Of ``tokens[i]`` under row i, and of the ``count`` likeliest, in descending order.

    A rank is 1 and the number of logits above the token's, so that equals share it.
    """
    total_R1 = logits_RV.logsumexp(dim=1, keepdim=True)
    own_R1 = logits_RV.gather(1, torch.tensor(tokens)[:, None])
    rank_R = 1 + (logits_RV > own_R1).sum(dim=1)
    top = logits_RV.topk(count, dim=1)
    values_RC = top.values - total_R1
    own_R = (own_R1 - total_R1)[:, 0]
    return Logprobs(own_R.tolist(), rank_R.tolist(), values_RC.tolist(), top.indices.tolist())


def sample(
    logits_RV: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    choices: Sequence[int],
    *,
    edited: bool,
) -> list[int]:
    """See ``reference.sample``."""
    tokens_R = logits_RV.argmax(dim=1)
    good_R = logits_RV.gather(1, tokens_R[:, None])[:, 0] > -torch.inf
    if not edited:
        good_R &= finite_rows(logits_RV)
    good = good_R.tolist()
    uniform = [
        uniform_number(p.seed, positions[i], choices[i]) if p.temperature > 0 else 0.0
        for i, p in enumerate(params)
    ]
    drawn = [i for i, p in enumerate(params) if p.temperature > 0 and good[i]]
    whole = [i for i in drawn if not _cuts(params[i])]
    cut = [i for i in drawn if _cuts(params[i])]
    for rows, draw in ((whole, _draw_of_all), (cut, _draw_of_some)):
        if rows:
            chosen = [params[i] for i in rows], [uniform[i] for i in rows]
            rows_RV = logits_RV if len(rows) == len(params) else logits_RV[rows]
            tokens_R[rows] = draw(rows_RV, *chosen)
    return torch.where(good_R, tokens_R, NOT_FINITE).tolist()


def finite_rows(logits_RV: Tensor) -> Tensor:
    """bool [R]: whether all of a row's logits are numbers, and finite."""
    # Both are NaN where a logit is; ``aminmax`` takes seventy times as long.
    return logits_RV.amax(dim=1).isfinite() & logits_RV.amin(dim=1).isfinite()


def _cuts(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _draw_of_all(logits_RV: Tensor, params: list[SamplingParams], uniform: list[float]) -> Tensor:
    temperature_R1 = _temperatures(params)
    weights_RV = ((logits_RV - logits_RV.amax(1, keepdim=True)) / temperature_R1).exp_()
    return _column_at(weights_RV, uniform)


def _draw_of_some(logits_RV: Tensor, params: list[SamplingParams], uniform: list[float]) -> Tensor:
    """From the likeliest tokens; from all where these do not hold all that is kept."""
    tokens_R, decided_R = _draw_among(_HEAD, logits_RV, params, uniform)
    rest = (~decided_R).nonzero()[:, 0].tolist()
    if rest:
        some = [params[i] for i in rest], [uniform[i] for i in rest]
        tokens_R[rest], _ = _draw_among(logits_RV.shape[1], logits_RV[rest], *some)
    return tokens_R


def _draw_among(
    count: int, logits_RV: Tensor, params: list[SamplingParams], uniform: list[float]
) -> tuple[Tensor, Tensor]:
    """Looks at the ``count`` largest logits of a row; the second result says where they hold all
    that is kept."""
    vocabulary = logits_RV.shape[1]
    count = min(count, vocabulary)
    largest_RK, order_RK = _largest(logits_RV, count)
    temperature_R1 = _temperatures(params)
    # Differences to the largest logit: no temperature is too small for them.
    weights_RK = ((largest_RK - largest_RK[:, :1]) / temperature_R1).exp()
    top_k_R1 = torch.tensor([p.top_k or vocabulary for p in params])[:, None]
    weights_RK = weights_RK.masked_fill(torch.arange(count) >= top_k_R1, 0.0)
    total_R1 = weights_RK.sum(dim=1, keepdim=True)
    more = (top_k_R1 > count)[:, 0].nonzero()[:, 0]
    if len(more):
        total_R1[more] = _total_weight(logits_RV, largest_RK, temperature_R1, more)
    before_RK = weights_RK.cumsum(dim=1) - weights_RK
    # A top-p of 1 keeps what rounding makes of the last ones, too.
    top_p_R1 = _column([p.top_p if p.top_p < 1 else torch.inf for p in params])
    kept_RK = before_RK < top_p_R1 * total_R1
    kept_RK &= (weights_RK >= _column([p.min_p for p in params])) & (weights_RK > 0)
    # Which of equal logits are among the largest is not certain.
    last_RK = kept_RK & (largest_RK <= largest_RK[:, -1:])
    decided_R = ~last_RK.any(dim=1) | (count == vocabulary)
    # Between the two the sum of what top-k leaves is not known.
    decided_R &= ((top_k_R1 <= count) | (top_k_R1 >= vocabulary))[:, 0]
    # Draws go by column, as from all.
    columns_RK, places_RK = order_RK.masked_fill(~kept_RK, vocabulary).sort(dim=1)
    places_R = _column_at((weights_RK * kept_RK).gather(1, places_RK), uniform)
    return columns_RK.gather(1, places_R[:, None])[:, 0], decided_R


def _column_at(weights_RK: Tensor, uniform: list[float]) -> Tensor:
    """int64 [R]: inverts the cumulative distribution over columns."""
    cumulative_RK = weights_RK.cumsum(dim=1, dtype=torch.float64)
    point_R1 = _column(uniform) * cumulative_RK[:, -1:]
    place_R1 = torch.searchsorted(cumulative_RK, point_R1, right=True)
    # Rounding may leave the point at the sum of all: then the last column with a weight.
    last_R1 = (cumulative_RK < cumulative_RK[:, -1:]).sum(dim=1, keepdim=True)
    return place_R1.minimum(last_R1)[:, 0]


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


def _temperatures(params: list[SamplingParams]) -> Tensor:
    return _column([p.temperature for p in params]).clamp(*TEMPERATURES)


def _column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]
