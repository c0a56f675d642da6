"""Log-probabilities of sampled and of prompt tokens, under the model's own distribution.

Shape letters: R rows, V vocabulary, T tokens in the batch, K features of a hidden state.
"""

from collections.abc import Callable
from collections.abc import Sequence as Many

from torch import Tensor

from engine.kernels import kernel
from engine.types import PromptLogprobs, ScheduledBatch, Sequence, TokenLogprobs

# Rows whose logits are in memory at once.
_ROWS = 64


def token_logprobs(
    logits_RV: Tensor, tokens: list[int], counts: list[int], backend: str
) -> list[TokenLogprobs]:
    """Of ``tokens[i]`` under row i, with its ``counts[i]`` likeliest; equals share a rank."""
    most = min(max(counts), logits_RV.shape[1])
    own, rank, values, ids = kernel("logprobs", backend)(logits_RV, tokens, most)
    return [
        TokenLogprobs(
            token, own[i], rank[i], list(zip(ids[i][:count], values[i][:count], strict=True))
        )
        for i, (token, count) in enumerate(zip(tokens, counts, strict=True))
    ]


class LogprobsReport:
    """Of the rows that ask, from logits as they were before anything changed them.

    ``changing`` says that something will: then the rows that ask are kept.
    """

    def __init__(
        self, logits_RV: Tensor, sequences: Many[Sequence], *, changing: bool, backend: str
    ) -> None:
        asked = [sequence.request.sampling.logprobs for sequence in sequences]
        self._counts = {row: count for row, count in enumerate(asked) if count is not None}
        self._backend = backend
        self._logits_RV: Tensor | None = None
        if self._counts:
            some = len(self._counts) < len(asked)
            kept_RV = logits_RV[list(self._counts)] if some else logits_RV
            self._logits_RV = kept_RV.clone() if changing and not some else kept_RV

    def of(self, tokens: list[int]) -> dict[int, TokenLogprobs]:
        """By row, of the ``tokens`` sampled from all rows; none where there is no token."""
        if self._logits_RV is None:
            return {}
        rows = list(self._counts)
        kept = [i for i, row in enumerate(rows) if tokens[row] >= 0]
        if not kept:
            return {}
        logits_RV = self._logits_RV if len(kept) == len(rows) else self._logits_RV[kept]
        rows = [rows[i] for i in kept]
        sampled = [tokens[row] for row in rows]
        counts = [self._counts[row] for row in rows]
        found = token_logprobs(logits_RV, sampled, counts, self._backend)
        return dict(zip(rows, found, strict=True))


def prompt_logprobs(
    batch: ScheduledBatch, hidden_TK: Tensor, head: Callable[[Tensor], Tensor], backend: str
) -> list[PromptLogprobs]:
    """Of the prompt tokens that follow the step's, for requests that ask; each token once.

    ``Sequence.reported`` remembers how far they are out, through chunks and preemption. ``head``
    makes logits of hidden states.
    """
    found: list[PromptLogprobs] = []
    row = 0
    for item in batch.items:
        sequence, first = item.sequence, item.sequence.computed
        start = max(first, sequence.reported)
        end = min(first + item.length, len(sequence.request.prompt) - 1)
        count = sequence.request.sampling.prompt_logprobs
        if count is not None and sequence.choice == 0 and start < end:
            rows_TK = hidden_TK[row + start - first : row + end - first]
            targets = sequence.request.prompt[start + 1 : end + 1]
            found.append(
                PromptLogprobs(sequence.id, _in_parts(rows_TK, targets, count, head, backend))
            )
            sequence.reported = end
        row += item.rows
    return found


def _in_parts(
    hidden_TK: Tensor,
    targets: list[int],
    count: int,
    head: Callable[[Tensor], Tensor],
    backend: str,
) -> list[TokenLogprobs]:
    found: list[TokenLogprobs] = []
    for start in range(0, len(targets), _ROWS):
        part = targets[start : start + _ROWS]
        logits_RV = head(hidden_TK[start : start + _ROWS])
        found += token_logprobs(logits_RV, part, [count] * len(part), backend)
    return found
