"""Validation: each bound from both sides, and values that are no numbers."""

import math
from dataclasses import fields, replace
from typing import Any

import pytest

from engine.client.constraints import MAX_CHARACTERS, MAX_VALUES, choice_constraint
from engine.client.defaults import GenerationDefaults
from engine.client.requests import GenerationRequest
from engine.client.validation import (
    MAX_BIASES,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_PRIORITY,
    MAX_STOP_CHARACTERS,
    MAX_STOP_IDS,
    MAX_STOPS,
    Limits,
    check,
    check_ids,
    sampling_params,
    stopping_params,
)
from engine.config import SchedulerConfig
from engine.core import EngineCore
from engine.errors import InvalidRequest, NotServed
from engine.testing import ArithmeticRunner
from engine.types import Constraint, StoppingParams

OPTIONAL = {each.name for each in fields(GenerationRequest) if "None" in str(each.type)}
LIMITS = Limits(vocabulary_size=100, max_sequence_tokens=64)


def request(**values: Any) -> GenerationRequest:
    return GenerationRequest(**{"id": "a", "prompt": "x", **values})


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("temperature", [0.0, 1e-3, 1, 100.0]),
        ("top_p", [1e-9, 0.5, 1, 1.0]),
        ("top_k", [0, 1, 100]),
        ("seed", [0, 1, (1 << 63), (1 << 64) - 1]),
        ("max_tokens", [1, 64]),
        ("max_duration", [1e-3, 1, 86400.0]),
        ("n", [1, MAX_CHOICES]),
        ("priority", [-MAX_PRIORITY, 0, MAX_PRIORITY]),
        ("queue_timeout", [1e-3, 1, 86400.0]),
        ("stop", [(), ("a",), ("a" * MAX_STOP_CHARACTERS,) * MAX_STOPS]),
        ("stop_token_ids", [(), (0, 99), (5,) * MAX_STOP_IDS]),
        ("min_p", [0.0, 1e-9, 1.0]),
        ("presence_penalty", [-2.0, 0.0, 2.0]),
        ("frequency_penalty", [-2.0, 0.0, 2.0]),
        ("repetition_penalty", [0.01, 1.0, 100.0]),
        ("logit_bias", [(), ((0, -100.0), (99, 100.0))]),
        ("logprobs", [0, MAX_LOGPROBS]),
        ("prompt_logprobs", [0, MAX_LOGPROBS]),
        ("min_tokens", [0, 64]),
        ("constraint", [Constraint(kind="regex", text="a" * MAX_CHARACTERS)]),
        ("prompt", ["", [0, 99], [5] * 63]),
    ],
)
def test_values_within_bounds_pass(name: str, good: list[Any]) -> None:
    for value in [*good, *([None] if name in OPTIONAL else [])]:
        check(request(**{name: value}), LIMITS)


NUMBERS_THAT_ARE_NONE = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize(
    ("name", "field", "bad"),
    [
        ("temperature", "sampling.temperature", [-1e-9, 100.1, *NUMBERS_THAT_ARE_NONE]),
        ("top_p", "sampling.top_p", [0, 0.0, -0.5, 1.0001, *NUMBERS_THAT_ARE_NONE]),
        ("top_k", "sampling.top_k", [-1, 101, 10**18]),
        ("seed", "sampling.seed", [-1, 1 << 64]),
        ("max_tokens", "stopping.max_tokens", [0, -1, 65, 10**18]),
        ("max_duration", "stopping.max_duration", [0, 1e-4, 86401, *NUMBERS_THAT_ARE_NONE]),
        ("n", "sampling.n", [0, -1, MAX_CHOICES + 1]),
        ("priority", "scheduling.priority", [-MAX_PRIORITY - 1, MAX_PRIORITY + 1]),
        ("queue_timeout", "scheduling.queue_timeout", [0, -1, 86401, *NUMBERS_THAT_ARE_NONE]),
        ("stop", "stopping.stop", [("",), ("a", ""), ("a",) * 17, ("a" * 257,)]),
        ("stop_token_ids", "stopping.stop_token_ids", [(-1,), (100,), (1,) * 129]),
        ("min_p", "sampling.min_p", [-1e-9, 1.0001, *NUMBERS_THAT_ARE_NONE]),
        ("presence_penalty", "sampling.presence_penalty", [-2.1, 2.1, *NUMBERS_THAT_ARE_NONE]),
        ("frequency_penalty", "sampling.frequency_penalty", [-2.1, 2.1, *NUMBERS_THAT_ARE_NONE]),
        (
            "repetition_penalty",
            "sampling.repetition_penalty",
            [0.0, -1.0, 0.009, 101.0, 1e-40, *NUMBERS_THAT_ARE_NONE],
        ),
        (
            "logit_bias",
            "sampling.logit_bias",
            [
                ((100, 1.0),),
                ((-1, 1.0),),
                ((1, 100.1),),
                ((1, -100.1),),
                ((1, 1.0),) * (MAX_BIASES + 1),
                *(((1, bad),) for bad in NUMBERS_THAT_ARE_NONE),
            ],
        ),
        ("logprobs", "output.logprobs", [-1, 21, 10**18]),
        ("prompt_logprobs", "output.prompt_logprobs", [-1, 21, 10**18]),
        ("min_tokens", "stopping.min_tokens", [-1, 65, 10**18]),
        (
            "constraint",
            "structured.regex",
            [
                Constraint(kind="regex", text=""),
                Constraint(kind="regex", text="a" * (MAX_CHARACTERS + 1)),
            ],
        ),
        ("prompt", "token_ids", [[-1], [100], [1, 2, 10**30]]),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(name: str, field: str, bad: list[Any]) -> None:
    for value in bad:
        with pytest.raises(InvalidRequest) as caught:
            check(request(**{name: value}), LIMITS)
        assert caught.value.field == field, value
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "seed", "max_tokens"])
def test_numbers_too_large_for_a_float_are_refused_too(name: str) -> None:
    with pytest.raises(InvalidRequest):
        check(request(**{name: 10**400}), LIMITS)


def test_limits_are_those_of_the_report() -> None:
    report = EngineCore(ArithmeticRunner(num_blocks=3), SchedulerConfig()).report()
    assert Limits.of(report) == Limits(97, 12, "the KV pool")
    whole = replace(report, max_sequence_tokens=report.context_length)
    assert Limits.of(whole).bound == "the model's context"


def test_ids_are_checked_against_the_vocabulary() -> None:
    check_ids("x", (0, 99), LIMITS)
    with pytest.raises(InvalidRequest, match="99"):
        check_ids("x", [100], LIMITS)


DEFAULTS = GenerationDefaults(temperature=0.5, top_p=0.9, top_k=7, eos_token_ids=(1, 2))


def test_what_is_open_comes_from_the_model() -> None:
    params = sampling_params(request(), DEFAULTS)
    assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.9, 7)


def test_what_is_said_wins_also_where_it_is_zero() -> None:
    params = sampling_params(request(temperature=0.0, top_k=0, top_p=1.0, seed=0), DEFAULTS)
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.0, 1.0, 0, 0)


def test_what_the_model_says_of_penalties_and_min_p_holds_until_the_request_does() -> None:
    defaults = GenerationDefaults(min_p=0.25, repetition_penalty=1.5)
    open_, said = (
        sampling_params(each, defaults)
        for each in (request(), request(min_p=0.0, repetition_penalty=1.0))
    )
    assert (open_.min_p, open_.repetition_penalty) == (0.25, 1.5)
    assert (said.min_p, said.repetition_penalty) == (0.0, 1.0)


def test_a_request_without_a_seed_gets_a_random_one_of_64_bits() -> None:
    seeds = {sampling_params(request(), DEFAULTS).seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 1 << 64 for seed in seeds)


def stopping(prompt_tokens: int, **values: Any) -> StoppingParams:
    return stopping_params(request(**values), DEFAULTS, LIMITS, prompt_tokens, arrival=100.0)


def test_without_max_tokens_the_context_is_the_limit() -> None:
    assert stopping(10).max_tokens == 54
    assert stopping(63).max_tokens == 1


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "field"),
    [
        (0, None, "input"),
        (0, 5, "input"),
        (64, None, "input"),
        (1000, None, "input"),
        (60, 5, "stopping.max_tokens"),
    ],
)
def test_what_does_not_fit_is_refused(
    prompt_tokens: int, max_tokens: int | None, field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        stopping(prompt_tokens, max_tokens=max_tokens)
    assert caught.value.field == field
    # Of ids the length is known before anything else is done.
    with pytest.raises(InvalidRequest) as caught:
        check(request(prompt=[1] * prompt_tokens, max_tokens=max_tokens), LIMITS)
    assert caught.value.field == field


def test_prompt_and_max_tokens_may_fill_the_context() -> None:
    assert stopping(59, max_tokens=5).max_tokens == 5


def test_end_tokens_are_the_models_unless_ignored() -> None:
    assert stopping(3).eos_token_ids == (1, 2)
    assert stopping(3, ignore_eos=True).eos_token_ids == ()
    assert stopping(3, stop_token_ids=(7,)).stop_token_ids == (7,)


def test_max_duration_counts_from_arrival_and_deadline_is_a_time() -> None:
    params = stopping(3, max_duration=2.5, deadline=101.0)
    assert (params.time_limit, params.deadline) == (102.5, 101.0)
    assert (stopping(3).time_limit, stopping(3).deadline) == (None, None)


REGEX = Constraint(kind="regex", text="a")


@pytest.mark.parametrize(
    ("prompt_tokens", "values"),
    [(10, {"min_tokens": 6, "max_tokens": 5}), (60, {"min_tokens": 5})],
)
def test_min_tokens_must_be_able_to_come(prompt_tokens: int, values: dict[str, int]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        stopping(prompt_tokens, **values)
    assert caught.value.field == "stopping.min_tokens"
    assert stopping(10, min_tokens=5, max_tokens=5).min_tokens == 5


def test_log_probabilities_of_a_prompt_must_fit_a_message() -> None:
    limits = Limits(vocabulary_size=100, max_sequence_tokens=10**6)
    stopping_params(request(prompt_logprobs=0), DEFAULTS, limits, 100_000, 0.0)
    with pytest.raises(InvalidRequest) as caught:
        stopping_params(request(prompt_logprobs=1), DEFAULTS, limits, 100_000, 0.0)
    assert caught.value.field == "output.prompt_logprobs"


def test_structured_output_needs_an_end_token() -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(request(constraint=REGEX, ignore_eos=True), LIMITS)
    assert caught.value.field == "stopping.ignore_eos"
    with pytest.raises(InvalidRequest) as caught:
        stopping_params(request(constraint=REGEX), GenerationDefaults(), LIMITS, 3, 0.0)
    assert caught.value.field == "structured"


def test_without_llguidance_structured_output_is_not_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.client.constraints.find_spec", lambda name: None)
    check(request(), LIMITS)
    with pytest.raises(NotServed, match="llguidance") as caught:
        check(request(constraint=REGEX), LIMITS)
    assert caught.value.field == "structured.regex"


def test_a_choice_has_values_and_none_of_them_is_empty() -> None:
    assert choice_constraint(["a", "b"]).text == '["a", "b"]'
    for values in ([], [""], ["a", ""], ["a"] * (MAX_VALUES + 1)):
        with pytest.raises(InvalidRequest) as caught:
            choice_constraint(values)
        assert caught.value.field == "structured.choice"
