"""Measured speeds: what steps took, and what that says about times to come."""

import random
from collections.abc import Callable

import pytest

from engine.speed import StepSpeed
from engine.types import Request

MakeRequest = Callable[..., Request]


def observed(*steps: tuple[float, int]) -> StepSpeed:
    speed = StepSpeed()
    for seconds, prompt_tokens in steps:
        speed.observe(seconds, prompt_tokens)
    return speed


def test_nothing_is_known_before_it_is_measured(make_request: MakeRequest) -> None:
    speed = StepSpeed()
    assert speed.prompt_tokens_within(0.1) is None
    assert speed.seconds_needed(make_request("a", 100, 100), 1000) == 0.0


def test_a_step_takes_its_decodes_and_its_prompt_tokens() -> None:
    speed = observed((0.02, 0), (0.12, 100))
    assert speed.decode_s == pytest.approx(0.02)
    assert speed.prompt_token_s == pytest.approx(0.001)
    assert speed.prompt_tokens_within(0.07) == 50
    assert speed.prompt_tokens_within(0.01) == 0, "never below zero"


def test_small_chunks_tell_too_little_about_prompts() -> None:
    assert observed((0.02, 0), (0.03, 8)).prompt_token_s is None


def test_a_small_chunk_faster_than_measured_shows_that_prompts_are_fast() -> None:
    """Under load there may be no other chunks: a wrong speed must not stay for ever."""
    speed = observed((0.02, 0), (40.0, 40), *[(0.03, 8)] * 30)
    assert speed.prompt_token_s is not None
    assert speed.prompt_token_s < 0.01


def test_speeds_follow_the_steps() -> None:
    speed = observed(*[(0.02, 0)] * 5, *[(0.03, 0)] * 30, *[(0.13, 100)] * 5, *[(0.23, 100)] * 30)
    assert speed.decode_s == pytest.approx(0.03, rel=0.01)
    assert speed.prompt_token_s == pytest.approx(0.002, rel=0.01)


def test_the_next_chunk_is_as_small_as_the_last_one_asks_for() -> None:
    """Later chunks of a prompt attend to more; the average would follow them too late."""
    speed = observed((0.02, 0), *[(0.12, 100)] * 10, (0.22, 100))
    assert speed.prompt_tokens_within(0.121) == 50


def test_one_step_that_was_held_up_counts_little() -> None:
    speed = observed(*[(0.02, 0)] * 5, (60.0, 0))
    assert speed.decode_s is not None
    assert speed.decode_s < 0.04


@pytest.mark.parametrize(
    "steps", [[(0.0, 0), *[(0.02, 0)] * 40], [(0.0, 0), (0.0, 40), *[(0.02, 0)] * 40]]
)
def test_a_step_without_duration_is_no_trap(steps: list[tuple[float, int]]) -> None:
    """A coarse clock may say 0; later steps say more."""
    assert observed(*steps).decode_s == pytest.approx(0.02, rel=0.01)


def test_a_prompt_faster_than_a_decode_is_no_trap() -> None:
    """The first decode may be slow; then a prompt's share of its step seems to be nothing."""
    speed = observed((0.5, 0), (0.1, 40), *[(0.01, 0)] * 60, *[(0.11, 100)] * 60)
    assert speed.prompt_token_s == pytest.approx(0.001, rel=0.05)
    assert speed.prompt_tokens_within(0.06) == pytest.approx(50, abs=3)


def test_a_noisy_machine_is_measured_well_enough() -> None:
    draw = random.Random(0)
    speed = StepSpeed()
    for _ in range(300):
        prompt_tokens = draw.choice([0, 8, 64, 500])
        noise = draw.choice([1.0, 1.1, 1.3])
        speed.observe(noise * (0.01 + 0.001 * prompt_tokens), prompt_tokens)
    assert speed.decode_s == pytest.approx(0.011, rel=0.3)
    assert speed.prompt_token_s == pytest.approx(0.0011, rel=0.3)


@pytest.mark.parametrize(
    ("stopping", "steps"),
    [
        ({}, 20),
        ({"eos_token_ids": (1,)}, 1),
        ({"stop_token_ids": (1,)}, 1),
        ({"eos_token_ids": (1,), "min_tokens": 5}, 5),
        ({"min_tokens": 5}, 20),
    ],
)
def test_what_a_request_needs_at_least(
    make_request: MakeRequest, stopping: dict[str, object], steps: int
) -> None:
    speed = observed((0.02, 0), (0.12, 100))
    request = make_request("a", 30, 20, **stopping)
    assert speed.seconds_needed(request, 30) == pytest.approx(0.03 + 0.02 * steps)
    assert speed.seconds_needed(request, 530) == pytest.approx(0.53 + 0.02 * steps)
