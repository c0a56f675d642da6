"""What changes logits before a token is chosen: bias, penalties, and ends that come too early.

Each function changes float32 logits [R, V] in place, and only the rows that ask for it; row i
belongs to ``sequences[i]``. The order is vLLM's: bias, then penalties, then temperature and
filters. Shape letters: R rows, V vocabulary, N (row, token) pairs, U of these without doubles.
"""

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from engine.types import SamplingParams, Sequence


def changes(sequence: Sequence) -> bool:
    """Whether anything here changes the sequence's row."""
    params = sequence.request.sampling
    early = sequence.generated < sequence.request.stopping.min_tokens
    return early or bool(params.logit_bias) or is_penalised(params)


def add_bias(logits_RV: Tensor, sequences: Many[Sequence]) -> None:
    """``logit_bias`` of the OpenAI API."""
    biases = [
        (row, token, bias)
        for row, sequence in enumerate(sequences)
        for token, bias in sequence.request.sampling.logit_bias
    ]
    if biases:
        rows, tokens, values = zip(*biases, strict=True)
        where = torch.tensor(rows), torch.tensor(tokens)
        logits_RV.index_put_(where, torch.tensor(values), accumulate=True)


def is_penalised(params: SamplingParams) -> bool:
    """Whether ``penalise`` changes rows of such requests."""
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    )


def penalise(logits_RV: Tensor, sequences: Many[Sequence]) -> None:
    """Makes tokens that came before less likely.

    Repetition penalty as in CTRL (Keskar et al. 2019): a positive logit of a token of prompt or
    completion is divided by it, a negative one multiplied. Then, as in the OpenAI API, a
    generated token's logit loses ``frequency_penalty`` for each time that it came and
    ``presence_penalty`` once.
    """
    rows = [i for i, sequence in enumerate(sequences) if is_penalised(sequence.request.sampling)]
    if not rows:
        return
    vocabulary = logits_RV.shape[1]
    keys_U, count_U = _counts([sequences[row] for row in rows], rows, vocabulary)
    rows_U, tokens_U = keys_U // vocabulary, keys_U % vocabulary
    params = [sequence.request.sampling for sequence in sequences]
    repetition_U = torch.tensor([p.repetition_penalty for p in params])[rows_U]
    frequency_U = torch.tensor([p.frequency_penalty for p in params])[rows_U]
    presence_U = torch.tensor([p.presence_penalty for p in params])[rows_U]
    logits_U = logits_RV[rows_U, tokens_U]
    logits_U = torch.where(logits_U > 0, logits_U / repetition_U, logits_U * repetition_U)
    logits_U -= frequency_U * count_U + presence_U * (count_U > 0)
    logits_RV[rows_U, tokens_U] = logits_U


def forbid_ends(logits_RV: Tensor, sequences: Many[Sequence]) -> None:
    """No end and no stop token before ``min_tokens``; where nothing else is allowed, it may come.

    So a constraint that is complete ends its sequence whatever ``min_tokens`` says.
    """
    early = [
        (row, token)
        for row, sequence in enumerate(sequences)
        if sequence.generated < sequence.request.stopping.min_tokens
        for token in _ends(sequence)
    ]
    if not early:
        return
    rows_N, tokens_N = torch.tensor(early).unbind(1)
    before_N = logits_RV[rows_N, tokens_N]
    logits_RV[rows_N, tokens_N] = -torch.inf
    rows_U = rows_N.unique()
    nothing_R = torch.zeros(len(sequences), dtype=torch.bool)
    nothing_R[rows_U] = logits_RV[rows_U].amax(1) == -torch.inf
    logits_RV[rows_N, tokens_N] = before_N.masked_fill(~nothing_R[rows_N], -torch.inf)


def _ends(sequence: Sequence) -> tuple[int, ...]:
    stopping = sequence.request.stopping
    return stopping.eos_token_ids + stopping.stop_token_ids


def _counts(sequences: list[Sequence], rows: list[int], vocabulary: int) -> tuple[Tensor, Tensor]:
    """Keys (row * vocabulary + token) of the tokens that came, and how often each was generated."""
    tokens: list[int] = []
    lengths: list[int] = []
    for sequence in sequences:
        prompt = sequence.request.prompt
        generated = sequence.tokens[len(prompt) :]
        if sequence.request.sampling.repetition_penalty == 1.0:
            prompt = []
        tokens += prompt
        tokens += generated
        lengths += [len(prompt), len(generated)]
    rows_N = torch.tensor(rows).repeat_interleave(2).repeat_interleave(torch.tensor(lengths))
    once_N = torch.tensor([0.0, 1.0] * len(rows)).repeat_interleave(torch.tensor(lengths))
    keys_N = rows_N * vocabulary + torch.tensor(tokens, dtype=torch.long)
    keys_U, inverse_N = keys_N.unique(return_inverse=True)
    return keys_U, torch.zeros(len(keys_U)).index_add_(0, inverse_N, once_N)
