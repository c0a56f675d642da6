"""Prefixes and prompts that several sequences share: computed once, found again, never mixed."""

from collections.abc import Callable
from typing import Any

import pytest

from engine.errors import InvalidRequest
from engine.types import FinishReason, Request, SamplingParams, StepResult

MakeRequest = Callable[..., Request]
MakeRig = Callable[..., Any]  # the Rig of conftest.py
PROMPT = list(range(100, 113))  # three full blocks of 4, and one token
LENGTH = FinishReason.LENGTH


def tables(rig: Any) -> dict[str, list[int]]:
    """Blocks of the running sequences, by name."""
    return {
        f"{s.id}.{s.choice}" if s.choice else s.id: s.block_table for s in rig.scheduler._running
    }


# --- the prefix cache


def test_the_second_request_computes_only_what_is_new(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig()
    rig.add(make_request("a", PROMPT, 2, cache_salt=""))
    rig.run()
    rig.add(make_request("b", PROMPT, 2, cache_salt=""))
    rig.add(make_request("c", [*PROMPT[:9], 1, 2, 3], 2, cache_salt=""))
    rig.run()
    assert rig.computed == {"a": 13 + 1, "b": 1 + 1, "c": 4 + 1}
    assert [rig.finished[name].cached for name in "abc"] == [0, 12, 8]
    assert rig.scheduler.stats().cached_tokens == 20


def test_the_first_token_tells_how_much_was_cached(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig()
    for name in "ab":
        rig.add(make_request(name, PROMPT, 3, cache_salt=""))
        rig.run()
    assert [event.cached for event in rig.events["a"]] == [0, 0, 0]
    assert [event.cached for event in rig.events["b"]] == [12, 0, 0]


@pytest.mark.parametrize(("length", "cached"), [(4, 0), (5, 4), (8, 4), (9, 8)])
def test_one_token_at_least_is_computed(
    make_rig: MakeRig, make_request: MakeRequest, length: int, cached: int
) -> None:
    """Its logits are wanted: a prompt of full blocks leaves its last one to compute."""
    rig = make_rig()
    for name in "ab":
        rig.add(make_request(name, PROMPT[:length], 1, cache_salt=""))
        rig.run()
    assert rig.finished["b"].cached == cached
    assert rig.computed["b"] == length - cached


def test_generated_tokens_are_found_by_the_next_turn(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    """A chat sends prompt and answer back, with something new behind them."""
    rig = make_rig()
    rig.add(make_request("a", PROMPT, 8, cache_salt=""))
    rig.run()
    rig.add(make_request("b", [*PROMPT, *rig.tokens["a"], 1, 2, 3], 1, cache_salt=""))
    rig.run()
    assert rig.finished["b"].cached == 20, "the last token's KV was never computed"
    assert rig.computed["b"] == 4


def test_a_running_request_shares_too(make_rig: MakeRig, make_request: MakeRequest) -> None:
    rig = make_rig()
    rig.add(make_request("a", PROMPT, 9, cache_salt=""))
    rig.step()
    rig.add(make_request("b", PROMPT, 9, cache_salt=""))
    assert rig.schedule() == {"a": 1, "b": 1}
    found = tables(rig)
    assert found["a"][:3] == found["b"][:3]
    assert found["a"][3] != found["b"][3]
    assert rig.blocks.used_blocks == 5
    rig.commit()
    rig.run()
    assert rig.tokens["a"] == rig.tokens["b"]


def test_full_blocks_of_unfinished_prompts_are_shared(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(token_budget=8)
    rig.add(make_request("a", PROMPT, 2, cache_salt=""))
    assert rig.step() == {"a": 8}
    rig.scheduler.cancel("a")
    rig.add(make_request("b", PROMPT, 2, cache_salt=""))
    assert rig.step() == {"b": 5}


def test_salts_separate(make_rig: MakeRig, make_request: MakeRequest) -> None:
    rig = make_rig()
    for name, salt in (("a", ""), ("b", "x"), ("c", "y"), ("d", "x")):
        rig.add(make_request(name, PROMPT, 1, cache_salt=salt))
        rig.run()
    assert [rig.finished[name].cached for name in "abcd"] == [0, 0, 0, 12]


def test_prompt_logprobs_need_every_position(make_rig: MakeRig, make_request: MakeRequest) -> None:
    rig = make_rig()
    sampling = SamplingParams(prompt_logprobs=0)
    rig.add(make_request("a", PROMPT, 1, cache_salt=""))
    rig.run()
    rig.add(make_request("b", PROMPT, 1, cache_salt="", sampling=sampling))
    rig.run()
    rig.add(make_request("c", PROMPT, 1, cache_salt=""))
    rig.run()
    assert rig.computed == {"a": 13, "b": 13, "c": 1}


def test_a_cached_prefix_is_given_up_where_room_is_needed(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(blocks=4)
    for name, prompt in (("a", PROMPT), ("b", [1] * 15), ("c", PROMPT)):
        rig.add(make_request(name, prompt, 1, cache_salt=""))
        rig.run()
    assert rig.computed == {"a": 13, "b": 15, "c": 13}
    assert all(one.preemptions == 0 for one in rig.finished.values())


def test_a_preempted_sequence_finds_its_own_blocks_again(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(max_sequences=1)
    rig.add(make_request("a", PROMPT, 6))
    for _ in range(4):
        rig.step()
    rig.add(make_request("high", 3, 1, priority=1))
    assert rig.step() == {"high": 3}
    assert rig.step() == {"a": 1}, "16 of its 17 tokens are still there"
    rig.run()
    assert rig.tokens["a"] == [7] * 6
    assert (rig.finished["a"].preemptions, rig.finished["a"].cached) == (1, 0)
    assert rig.scheduler.stats().cached_tokens == 0, "what it had computed itself is no hit"


def test_a_failed_step_leaves_nothing_to_be_found(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig()
    rig.add(make_request("a", PROMPT, 1, cache_salt=""))
    rig.schedule()
    rig.scheduler.fail(rig.batch, "fell over", rig.now)
    assert rig.blocks.cached_blocks == 0
    rig.add(make_request("b", PROMPT, 1, cache_salt=""))
    assert rig.step() == {"b": 13}


def test_logits_that_are_not_finite_leave_nothing_to_be_found(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    """KV that gave them may be broken too; whoever comes next computes it anew."""
    rig = make_rig()
    rig.add(make_request("a", PROMPT, 4, cache_salt=""), make_request("b", [1] * 8, 4))
    rig.schedule()
    rig.scheduler.commit(rig.batch, StepResult([-1, 7]), rig.now)
    rig.scheduler.check_invariants()
    rig.add(make_request("c", PROMPT, 1, cache_salt=""))
    assert rig.step() == {"b": 1, "c": 13}


# --- several choices


def test_the_prompt_of_several_choices_is_computed_once(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(blocks=32)
    rig.add(make_request("a", PROMPT, 3, choices=4))
    assert rig.step() == {"a": 13}
    assert rig.step() == {"a": 1, "a.1": 1, "a.2": 1, "a.3": 1}
    rig.run()
    assert rig.computed == {"a": 13 + 2, "a.1": 1 + 2, "a.2": 1 + 2, "a.3": 1 + 2}
    assert rig.tokens == {key: [7, 7, 7] for key in ["a", "a.1", "a.2", "a.3"]}
    assert rig.reasons() == dict.fromkeys(rig.tokens, FinishReason.LENGTH)


def test_choices_share_full_blocks_and_own_the_rest(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(blocks=32)
    rig.add(make_request("a", PROMPT, 9, choices=3))
    rig.step()
    rig.step()
    found = list(tables(rig).values())
    assert len(found) == 3
    assert all(table[:3] == found[0][:3] for table in found)
    assert len({table[3] for table in found}) == 3
    assert rig.blocks.used_blocks == 3 + 3
    rig.run()
    assert rig.blocks.used_blocks == 0


def test_others_wait_for_a_prompt_in_chunks(make_rig: MakeRig, make_request: MakeRequest) -> None:
    rig = make_rig(token_budget=8)
    rig.add(make_request("a", PROMPT, 2, choices=2), make_request("b", 2, 2))
    assert [rig.step(), rig.step()] == [{"a": 8}, {"a": 5, "b": 2}]
    assert rig.step() == {"a": 1, "b": 1, "a.1": 1}


def test_more_choices_than_places_all_end(make_rig: MakeRig, make_request: MakeRequest) -> None:
    rig = make_rig(max_sequences=2)
    rig.add(make_request("a", PROMPT, 3, choices=5))
    rig.run()
    assert rig.reasons() == dict.fromkeys(["a", *(f"a.{n}" for n in range(1, 5))], LENGTH)
    assert sum(rig.computed.values()) == 13 + 4 + 5 * 2


def test_a_choice_ends_without_the_others(make_rig: MakeRig, make_request: MakeRequest) -> None:
    rig = make_rig()
    rig.add(make_request("a", 3, 3, choices=3, stop_token_ids=(5,)))
    rig.step()
    rig.schedule()
    rig.scheduler.commit(rig.batch, StepResult([7, 5, 7]), rig.now)
    rig.scheduler.check_invariants()
    assert set(rig.schedule()) == {"a", "a.2"}
    rig.commit()
    rig.run()
    assert rig.reasons() == {"a": LENGTH, "a.2": LENGTH}


@pytest.mark.parametrize("steps", [0, 1, 3], ids=["waiting", "prefill", "decode"])
@pytest.mark.parametrize("choice", [0, 1, 2])
def test_cancel_of_one_choice_leaves_the_others(
    make_rig: MakeRig, make_request: MakeRequest, choice: int, steps: int
) -> None:
    rig = make_rig(token_budget=8)
    rig.add(make_request("a", PROMPT, 6, choices=3))
    for _ in range(steps):
        rig.step()
    rig.scheduler.cancel("a", choice)
    rig.run()
    names = ["a", "a.1", "a.2"]
    wanted = [FinishReason.CANCELLED if n == choice else LENGTH for n in range(3)]
    assert [rig.reasons()[name] for name in names] == wanted
    assert [len(rig.tokens.get(name, ())) == 6 for name in names] == [w is LENGTH for w in wanted]
    assert rig.blocks.used_blocks == 0


def test_the_next_choice_leads_where_the_first_one_is_gone(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    """The others still compute the prompt once."""
    rig = make_rig(token_budget=64)
    rig.add(make_request("a", PROMPT, 2, choices=3))
    rig.scheduler.cancel("a", 0)
    assert rig.step() == {"a.1": 13}
    assert rig.step() == {"a.1": 1, "a.2": 1}


@pytest.mark.parametrize("steps", [0, 1, 3], ids=["waiting", "prefill", "decode"])
def test_cancel_ends_all_choices(make_rig: MakeRig, make_request: MakeRequest, steps: int) -> None:
    rig = make_rig(token_budget=8)
    rig.add(make_request("a", PROMPT, 6, choices=3))
    for _ in range(steps):
        rig.step()
    rig.scheduler.cancel("a")
    assert rig.schedule() == {}
    assert rig.reasons() == dict.fromkeys(["a", "a.1", "a.2"], FinishReason.CANCELLED)
    assert not rig.scheduler.has_work
    assert rig.blocks.used_blocks == 0


@pytest.mark.parametrize("choice", [-1, 2, 99])
def test_cancel_of_an_unknown_choice_does_no_harm(
    make_rig: MakeRig, make_request: MakeRequest, choice: int
) -> None:
    rig = make_rig()
    rig.add(make_request("a", 3, 2, choices=2))
    rig.scheduler.cancel("a", choice)
    rig.run()
    assert rig.reasons() == {"a": LENGTH, "a.1": LENGTH}


def test_an_id_is_taken_until_its_last_choice_has_ended(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig()
    rig.add(make_request("a", 3, 9, choices=2))
    rig.step()
    rig.scheduler.cancel("a", 0)
    rig.step()
    with pytest.raises(InvalidRequest, match="running"):
        rig.add(make_request("a"))
    rig.run()
    rig.finished.clear()
    rig.add(make_request("a"))
    rig.run()
    assert rig.reasons() == {"a": LENGTH}


def test_time_ends_every_choice(make_rig: MakeRig, make_request: MakeRequest) -> None:
    rig = make_rig()
    rig.add(make_request("a", 3, 40, choices=3, time_limit=4.0))
    rig.run()
    assert rig.reasons() == dict.fromkeys(["a", "a.1", "a.2"], FinishReason.TIME_LIMIT)


def test_a_failed_step_ends_the_choices_in_it(make_rig: MakeRig, make_request: MakeRequest) -> None:
    rig = make_rig(max_sequences=2)
    rig.add(make_request("a", 3, 4, choices=3))
    rig.step()
    assert set(rig.schedule()) == {"a", "a.1"}
    ended = rig.scheduler.fail(rig.batch, "fell over", rig.now)
    assert [(one.choice, one.reason) for one in ended] == [
        (0, FinishReason.ERROR),
        (1, FinishReason.ERROR),
    ]
    rig.scheduler.check_invariants()
    rig.run()
    assert rig.reasons() == {"a.2": LENGTH}


def test_preempted_choices_end_with_all_their_tokens(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(blocks=6)
    rig.add(make_request("a", 9, 12, choices=4))
    rig.run()
    assert rig.scheduler.stats().preemptions > 0
    assert [len(tokens) for tokens in rig.tokens.values()] == [12] * 4


def test_stats_count_choices_and_shared_blocks_once(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(max_sequences=3)
    rig.add(make_request("a", PROMPT, 3, choices=4))
    rig.step()
    rig.step()
    stats = rig.scheduler.stats()
    assert (stats.queued, stats.running) == (1, 3)
    assert (stats.blocks_used, stats.blocks_free, stats.blocks_cached) == (6, 10, 0)
    rig.run()
    stats = rig.scheduler.stats()
    assert (stats.blocks_used, stats.blocks_cached) == (0, 3)
    assert stats.prompt_tokens - stats.cached_tokens == 13 + 3, "what was computed of the prompt"
    assert (stats.generated_tokens, stats.preemptions, stats.recomputed_tokens) == (12, 0, 0)
