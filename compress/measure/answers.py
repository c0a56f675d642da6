"""How models answer: the likelihood of each choice."""

from collections.abc import Callable

import torch
from torch import Tensor

from compress.measure.tasks import Choice, Question

# Token ids -> float32 logits [T, V]; row i predicts token i + 1.
Logits = Callable[[list[int]], Tensor]


def is_right(logits: Logits, question: Question) -> bool:
    """Whether the right choice is likelier than all others; NaN is never right."""
    scores = [log_likelihood(logits, choice) for choice in question.choices]
    best = scores[question.answer]
    return all(best > score for i, score in enumerate(scores) if i != question.answer)


def log_likelihood(logits: Logits, choice: Choice) -> float:
    """Of the scored tokens, in nats."""
    logits_TV = logits(list(choice.ids))
    log_p_SV = logits_TV[choice.begin - 1 : -1].float().log_softmax(dim=-1)
    ids_S1 = torch.tensor(choice.ids[choice.begin :])[:, None]
    return float(log_p_SV.gather(1, ids_S1).sum(dtype=torch.float64))
