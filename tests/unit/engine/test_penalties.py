"""Bias, penalties and early ends against references that look at one row and token at a time."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.endings import NOTHING_LEFT
from engine.kernels import kernel
from engine.kernels.cpu import library
from engine.penalties import add_bias, forbid_ends
from engine.sampler import sample
from engine.types import Request, SamplingParams, Sequence, StoppingParams

VOCABULARY = 23
INF = float("inf")


def sequence(prompt: list[int], generated: list[int], **values: Any) -> Sequence:
    names = ("min_tokens", "eos_token_ids", "stop_token_ids")
    stopping = {name: values.pop(name) for name in names if name in values}
    request = Request(
        id="a",
        prompt=prompt,
        sampling=SamplingParams(**values),
        stopping=StoppingParams(max_tokens=50, **stopping),
        arrival=0.0,
    )
    return Sequence(request, prompt + generated)


def random_sequence(chance: random.Random) -> Sequence:
    """With some of the features, or none."""
    values: dict[str, Any] = {}
    if chance.random() < 0.5:
        values["repetition_penalty"] = chance.uniform(0.5, 2.0)
    if chance.random() < 0.5:
        values["presence_penalty"] = chance.uniform(-2.0, 2.0)
    if chance.random() < 0.5:
        values["frequency_penalty"] = chance.uniform(-2.0, 2.0)
    if chance.random() < 0.5:
        ids = chance.sample(range(VOCABULARY), 4)
        values["logit_bias"] = tuple((token, chance.uniform(-9, 9)) for token in ids)
    prompt = [chance.randrange(VOCABULARY) for _ in range(chance.randrange(1, 30))]
    generated = [chance.randrange(VOCABULARY) for _ in range(chance.randrange(30))]
    return sequence(prompt, generated, **values)


def reference(logits_V: Tensor, one: Sequence) -> Tensor:
    params, prompt = one.request.sampling, one.request.prompt
    generated = one.tokens[len(prompt) :]
    logits = logits_V.clone()
    for token, bias in params.logit_bias:
        logits[token] += bias
    for token in range(VOCABULARY):
        if token in one.tokens:
            factor = torch.tensor(params.repetition_penalty)
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        if token in generated:
            logits[token] -= params.frequency_penalty * generated.count(token)
            logits[token] -= params.presence_penalty
    return logits


def random_logits(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4


def edited(logits_RV: Tensor, sequences: list[Sequence]) -> Tensor:
    """By torch; the native kernel gives the same bits with each instruction set."""
    biased_RV = logits_RV.clone()
    add_bias(biased_RV, sequences)
    found_RV = biased_RV.clone()
    kernel("penalise", "torch")(found_RV, sequences)
    for name in library.supported():
        native_RV, kernels = biased_RV.clone(), library.kernels(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("engine.kernels.cpu.penalise.kernels", lambda kernels=kernels: kernels)
            kernel("penalise", "cpu")(native_RV, sequences)
        assert torch.equal(native_RV, found_RV)
    return found_RV


@pytest.mark.parametrize("seed", range(10))
def test_a_batch_is_edited_as_its_rows_one_by_one(seed: int) -> None:
    chance = random.Random(seed)
    sequences = [random_sequence(chance) for _ in range(12)]
    logits = random_logits(12, seed)
    found = edited(logits, sequences)
    for row, one in enumerate(sequences):
        torch.testing.assert_close(found[row], reference(logits[row], one))
        assert torch.equal(found[row], edited(logits[row : row + 1], [one])[0])


def test_rows_without_a_feature_keep_every_bit() -> None:
    logits = random_logits(3)
    plain = sequence([1, 2], [3, 3])
    changed = sequence([1, 2], [3, 3], repetition_penalty=1.3, logit_bias=((4, 1.0),))
    found = edited(logits, [plain, changed, plain])
    assert torch.equal(found[[0, 2]], logits[[0, 2]])
    assert not torch.equal(found[1], logits[1])
    assert torch.equal(edited(logits, [plain] * 3), logits)


def test_presence_and_frequency_do_not_count_the_prompt() -> None:
    logits = torch.zeros(1, VOCABULARY)
    one = sequence([5, 5, 5], [7, 7], presence_penalty=1.0, frequency_penalty=0.25)
    found = edited(logits, [one])[0]
    assert found[7] == -1.5
    assert found.count_nonzero() == 1


def test_repetition_counts_the_prompt_and_counts_once() -> None:
    logits = torch.full((1, VOCABULARY), 3.0)
    logits[0, 7] = -3.0
    found = edited(logits, [sequence([5, 5], [7, 7], repetition_penalty=2.0)])[0]
    assert (found[5], found[7], found[6]) == (1.5, -6.0, 3.0)


def test_before_the_first_token_there_is_nothing_to_penalise() -> None:
    logits = random_logits(1)
    assert torch.equal(edited(logits, [sequence([5], [], presence_penalty=2.0)]), logits)


def test_no_end_comes_before_min_tokens() -> None:
    logits = random_logits(3)
    ends: dict[str, Any] = {"eos_token_ids": (0, 2), "stop_token_ids": (2, 9)}
    early = sequence([1], [4, 4], min_tokens=3, **ends)
    done = sequence([1], [4, 4, 4], min_tokens=3, **ends)
    found = logits.clone()
    forbid_ends(found, [early, done, sequence([1], [], **ends)])
    assert (found[0] == -INF).nonzero()[:, 0].tolist() == [0, 2, 9]
    assert torch.equal(found[1:], logits[1:])


def test_an_end_that_is_the_only_way_on_comes_before_min_tokens() -> None:
    logits = torch.full((2, VOCABULARY), -INF)
    logits[0, 2] = 1.0
    logits[1] = torch.arange(VOCABULARY)
    one = sequence([1], [], min_tokens=3, eos_token_ids=(2, 22))
    forbid_ends(logits, [one, one])
    assert logits[0].argmax() == 2
    assert logits[1].argmax() == 21
    assert logits[1, 22] == -INF


def test_a_row_of_which_nothing_is_left_is_named_and_leaves_the_others_alone() -> None:
    logits = random_logits(3)
    params = [SamplingParams(temperature=1.0, seed=n) for n in range(3)]
    wanted = sample(logits.clone(), params, [0] * 3)

    def edit(logits_RV: Tensor) -> None:
        logits_RV[1] = -INF

    found = sample(logits, params, [0] * 3, edit=edit)
    assert found == [wanted[0], NOTHING_LEFT, wanted[2]]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_long_texts_are_penalised_by_any_number_of_threads(threads: int) -> None:
    chance = random.Random(threads)
    sequences = [
        sequence(
            [chance.randrange(VOCABULARY) for _ in range(9000)],
            [3, 4, 4],
            **{
                "repetition_penalty": 1.3,
                "frequency_penalty": 0.2,
                "presence_penalty": 0.1,
            },
        )
        for _ in range(5)
    ]
    found_RV, native_RV = random_logits(5), random_logits(5)
    kernel("penalise", "torch")(found_RV, sequences)
    try:
        torch.set_num_threads(threads)
        kernel("penalise", "cpu")(native_RV, sequences)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(native_RV, found_RV)
