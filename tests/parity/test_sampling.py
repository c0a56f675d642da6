"""The sampler against transformers' logits warpers: the same tokens, equally often."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.penalties import penalise
from engine.sampler import sample
from engine.types import Request, SamplingParams, Sequence, StoppingParams

DRAWS = 3000


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 5, 1.0, 0.0),
        (0.7, 50, 0.8, 0.0),
        (1.5, 12, 0.95, 0.1),
        (0.3, 64, 0.5, 0.0),
        (2.0, 3, 0.9, 0.5),
        (2.0, 64, 0.98, 0.05),
        (1.0, 64, 1.0, 0.2),
    ],
)
def test_draws_are_those_of_the_warped_distribution(
    temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    logits = torch.randn(1, 64, generator=torch.Generator().manual_seed(seed)) * 3
    warpers = LogitsProcessorList(
        [
            TemperatureLogitsWarper(temperature),
            TopKLogitsWarper(top_k),
            TopPLogitsWarper(top_p),
            MinPLogitsWarper(min_p),
        ]
    )
    wanted = warpers(torch.zeros(1, 1, dtype=torch.long), logits)[0].softmax(0)
    params = [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=draw)
        for draw in range(DRAWS)
    ]
    tokens = sample(logits.expand(DRAWS, -1).clone(), params, [0] * DRAWS)
    found = torch.bincount(torch.tensor(tokens), minlength=64) / DRAWS
    assert not bool(found[wanted == 0].any())
    # Five standard deviations of a frequency.
    assert bool(((found - wanted).abs() <= 5 * (wanted * (1 - wanted) / DRAWS).sqrt()).all())


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_repetition_is_penalised_alike(penalty: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 64, generator=generator) * 3
    tokens = torch.randint(0, 64, (4, 30), generator=generator)
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits.clone())
    sequences = [
        Sequence(
            Request(
                id="a",
                prompt=row[:12],
                sampling=SamplingParams(repetition_penalty=penalty),
                stopping=StoppingParams(max_tokens=50),
                arrival=0.0,
            ),
            row,
        )
        for row in tokens.tolist()
    ]
    penalise(logits, sequences)
    torch.testing.assert_close(logits, wanted)
