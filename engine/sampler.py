"""Logits -> token ids, of all rows of a step.

Sampling draws one uniform number for each token, keyed by (seed, choice, position), and inverts
the cumulative distribution: a request's tokens depend on its own logits and seed alone.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from engine.endings import NOT_FINITE, NOTHING_LEFT
from engine.kernels import kernel
from engine.kernels.torch_sampling import finite_rows
from engine.types import SamplingParams

# Changes logits in place: penalties, or -inf for tokens that are not allowed.
Edit = Callable[[Tensor], None]


def sample(
    logits_RV: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    choices: Sequence[int] | None = None,
    edit: Edit | None = None,
    backend: str = "torch",
) -> list[int]:
    """The next token of each row; ``NOT_FINITE`` for a row with NaN or infinite logits,
    ``NOTHING_LEFT`` for one of which ``edit`` leaves nothing.

    ``positions[i]`` is the number of tokens that row i has generated before, ``choices[i]``
    which choice of its request it is. ``backend`` is whose kernels draw.
    """
    draw = kernel("sample", backend)
    choices = choices or [0] * len(params)
    if edit is None:
        tokens: list[int] = draw(logits_RV, params, positions, choices, edited=False)
        return tokens
    finite = finite_rows(logits_RV).tolist()
    edit(logits_RV)
    tokens = draw(logits_RV, params, positions, choices, edited=True)
    left = [NOTHING_LEFT if token == NOT_FINITE else token for token in tokens]
    return [token if good else NOT_FINITE for token, good in zip(left, finite, strict=True)]
