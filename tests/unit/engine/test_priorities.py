"""Who is served first, who gives way, and who is refused: priorities, deadlines, gaps."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from engine.types import FinishReason, Request

MakeRequest = Callable[..., Request]
MakeRig = Callable[..., Any]  # the Rig of conftest.py


def order_of_ends(rig: Any) -> list[str]:
    rig.run()
    return list(rig.finished)


# --- the order of service


def test_a_higher_priority_is_served_first(make_rig: MakeRig, make_request: MakeRequest) -> None:
    rig = make_rig(max_sequences=1)
    rig.add(*(make_request(f"{p}", priority=p) for p in (0, -3, 7, 2)))
    assert order_of_ends(rig) == ["7", "2", "0", "-3"]


def test_within_a_priority_the_earliest_deadline_is_served_first(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(max_sequences=1)
    rig.add(
        make_request("never"),
        make_request("late", deadline=2000.0),
        make_request("soon", deadline=1000.0),
        make_request("above", priority=1),
        make_request("below", priority=-1, deadline=500.0),
    )
    assert order_of_ends(rig) == ["above", "soon", "late", "never", "below"]


def test_else_the_first_to_arrive_is_served_first(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(max_sequences=1)
    requests = [make_request(name, priority=1, deadline=1000.0) for name in "abc"]
    rig.add(*reversed(requests))
    assert order_of_ends(rig) == ["a", "b", "c"]


def test_the_budget_of_a_step_goes_to_the_higher_priority_first(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(token_budget=8)
    rig.add(make_request("low", 12))
    assert rig.step() == {"low": 8}
    rig.add(make_request("high", 12, priority=1))
    assert rig.step() == {"low": 4, "high": 4}, "what runs goes on before others begin"
    rig.add(make_request("higher", 12, priority=2))
    assert list(rig.step().items()) == [("low", 1), ("high", 7)]
    rig.add(make_request("middle", 12, priority=1))
    assert list(rig.step().items()) == [("high", 1), ("low", 1), ("higher", 6)]


# --- places and blocks of lower ones


def test_a_higher_priority_takes_the_place_of_a_lower_one(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(max_sequences=2)
    rig.add(make_request("a", 3, 9), make_request("b", 4, 9))
    rig.step()
    rig.add(make_request("high", 3, 2, priority=1))
    assert set(rig.step()) == {"b", "high"}, "a has less to lose"
    assert order_of_ends(rig)[0] == "high"
    assert {name: one.preemptions for name, one in rig.finished.items()} == {
        "high": 0,
        "a": 1,
        "b": 0,
    }
    assert [len(rig.tokens[name]) for name in ("a", "b")] == [9, 9]


def test_a_higher_priority_takes_the_blocks_of_lower_ones(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(blocks=8)
    rig.add(*(make_request(name, 8, 4, priority=-1) for name in "ab"), make_request("c", 8, 4))
    rig.step()
    rig.add(make_request("high", 15, 2, priority=1))
    rig.step()
    assert set(rig.step()) == {"c", "high"}, "c grows, too, so that both a and b give way"
    order_of_ends(rig)
    assert {name: one.preemptions for name, one in rig.finished.items()} == {
        "c": 0,
        "high": 0,
        "a": 1,
        "b": 1,
    }


@pytest.mark.parametrize("priority", [0, -1], ids=["equal", "lower"])
@pytest.mark.parametrize("limit", [{"blocks": 4}, {"max_sequences": 1}], ids=["blocks", "places"])
def test_an_equal_or_lower_priority_waits(
    make_rig: MakeRig, make_request: MakeRequest, limit: dict[str, int], priority: int
) -> None:
    rig = make_rig(**limit)
    rig.add(make_request("a", 8, 4))
    rig.step()
    rig.add(make_request("b", 8, 4, priority=priority, deadline=1000.0))
    assert list(rig.step()) == ["a"]
    assert order_of_ends(rig) == ["a", "b"]
    assert [rig.finished[name].preemptions for name in "ab"] == [0, 0]


def test_a_higher_priority_takes_nothing_that_it_does_not_need(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(blocks=8, max_sequences=3)
    rig.add(make_request("a", 8, 4), make_request("b", 3, 4))
    rig.step()
    rig.add(make_request("high", 8, 4, priority=1))
    assert set(rig.step()) == {"a", "b", "high"}
    order_of_ends(rig)
    assert rig.scheduler.stats().preemptions == 0


def test_blocks_that_are_shared_need_not_be_taken_from_others(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    """A prefix that is in the cache, or in use, costs a high priority no room."""
    rig = make_rig(blocks=6)
    rig.add(make_request("a", 14, 6, cache_salt=""))
    rig.step()
    rig.add(make_request("high", 14, 2, priority=1, cache_salt=""))
    assert rig.step() == {"a": 1, "high": 14 - 12}
    order_of_ends(rig)
    assert rig.finished["a"].preemptions == 0


def test_a_choice_that_waits_for_its_leader_takes_no_place_yet(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    """It cannot run before the prompt is computed; a lower one may go on that long."""
    rig = make_rig(max_sequences=2, token_budget=8)
    rig.add(make_request("low", 3, 30))
    rig.step()
    rig.add(make_request("high", 28, 4, priority=1, choices=2))
    for _ in range(3):
        assert rig.step() == {"low": 1, "high": 7}
    assert rig.step() == {"low": 1, "high": 7}
    assert set(rig.step()) == {"high", "high.1"}
    order_of_ends(rig)
    assert rig.finished["low"].preemptions == 1
    assert len(rig.tokens["low"]) == 30


# --- victims


def test_the_victim_has_the_lowest_priority_then_least_to_lose(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(blocks=10)
    rig.add(
        make_request("first", 4, 12, priority=1),
        make_request("long", 11, 12),
        make_request("short", 7, 12),
        make_request("lowest", 11, 12, priority=-1),
    )
    preempted = []
    for _ in range(60):
        before = {s.id: s.preemptions for s in rig.scheduler._running}
        rig.schedule()
        waiting = rig.scheduler._waiting
        preempted += [s.id for s in waiting if s.preemptions > before.get(s.id, s.preemptions)]
        rig.commit()
        if len(preempted) >= 2:
            break
    assert preempted[:2] == ["lowest", "short"]
    rig.run()
    assert rig.finished["first"].preemptions == 0


def test_the_one_with_most_to_lose_goes_on(make_rig: MakeRig, make_request: MakeRequest) -> None:
    """Also where one with less has its place in the step already: it gives that up, too."""
    rig = make_rig(blocks=6)
    rig.add(make_request("little", 5, 9), make_request("much", 15, 9))
    rig.step()
    rig.step()
    assert rig.step() == {"much": 1}
    order_of_ends(rig)
    assert rig.finished["much"].preemptions == 0
    assert [len(rig.tokens[name]) for name in ("little", "much")] == [9, 9]


def test_a_victim_comes_back_before_those_behind_it(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(max_sequences=1)
    rig.add(make_request("a", 3, 9))
    rig.step()
    rig.add(make_request("b", 3, 2), make_request("high", 3, 2, priority=1))
    assert order_of_ends(rig) == ["high", "a", "b"]
    assert rig.finished["a"].preemptions == 1


def test_a_victim_keeps_its_times_and_its_tokens(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(max_sequences=1)
    rig.add(make_request("a", 3, 4))
    rig.step(token=5)
    rig.step(token=6)
    rig.add(make_request("high", 3, 1, priority=1))
    rig.run()
    a = rig.finished["a"]
    assert (a.scheduled_at, a.first_token_at, a.preemptions) == (0.0, 0.0, 1)
    assert rig.tokens["a"] == [5, 6, 7, 7]


@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize("budget", [8, 64])
def test_a_tiny_pool_never_comes_to_a_standstill(
    make_rig: MakeRig, make_request: MakeRequest, budget: int, choices: int
) -> None:
    """Each of them fits alone only; still all end, with all their tokens."""
    rig = make_rig(blocks=3, token_budget=budget)
    for n in range(6):
        request = make_request(f"{n}", 3 + n % 3, 7, choices=choices, priority=n % 2)
        rig.add(dataclasses.replace(request, cache_salt=str(n % 2)))
    rig.run(steps=400)
    assert set(rig.reasons().values()) == {FinishReason.LENGTH}
    assert len(rig.finished) == 6 * choices
    assert all(len(tokens) == 7 for tokens in rig.tokens.values())


def test_a_stream_of_newcomers_starves_nobody_of_their_priority(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    """Newcomers with more to lose may take blocks, but never for ever."""
    rig = make_rig(blocks=8, token_budget=32)
    rig.add(make_request("old", 3, 24))
    for n in range(300):
        if "old" in rig.finished:
            break
        rig.add(make_request(f"new {n}", 20, 8))
        rig.step()
    assert rig.reasons()["old"] is FinishReason.LENGTH


# --- time in the queue


def test_queue_timeout_refuses_what_never_ran(make_rig: MakeRig, make_request: MakeRequest) -> None:
    rig = make_rig(max_sequences=1)
    rig.add(make_request("a", 3, 9), make_request("b", 3, 9, queue_deadline=3.0))
    rig.run()
    assert rig.reasons() == {"b": FinishReason.REFUSED, "a": FinishReason.LENGTH}
    refused = rig.finished["b"]
    assert (refused.finished_at, refused.scheduled_at) == (3.0, None)
    assert "queue" in refused.message
    assert refused.retry_after_s > 0


def test_queue_timeout_is_over_once_it_ran(make_rig: MakeRig, make_request: MakeRequest) -> None:
    rig = make_rig(max_sequences=1)
    rig.add(make_request("a", 3, 9, queue_deadline=1.0))
    rig.step()
    rig.add(make_request("high", 3, 5, priority=1))
    rig.run()
    assert rig.finished["a"].preemptions == 1
    assert rig.reasons() == dict.fromkeys(["high", "a"], FinishReason.LENGTH)


def test_queue_timeout_leaves_choices_of_a_running_request_alone(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    """The request runs; its other choices only wait for a place."""
    rig = make_rig(max_sequences=1)
    rig.add(make_request("a", 3, 4, queue_deadline=2.0, choices=3))
    rig.run()
    assert rig.reasons() == dict.fromkeys(["a", "a.1", "a.2"], FinishReason.LENGTH)


def test_queue_timeout_refuses_all_choices(make_rig: MakeRig, make_request: MakeRequest) -> None:
    rig = make_rig(max_sequences=1)
    rig.add(make_request("a", 3, 9), make_request("b", 3, 9, queue_deadline=2.0, choices=2))
    rig.run()
    assert [rig.reasons()[name] for name in ("b", "b.1")] == [FinishReason.REFUSED] * 2


# --- deadlines that cannot be met


def measured(make_rig: MakeRig, make_request: MakeRequest, **values: Any) -> Any:
    """A rig that knows its speeds: 0.5 s for each step, 0.01 s for each prompt token."""
    rig = make_rig(blocks=64, context_length=256, token_budget=128, **values)
    rig.cost = lambda decodes, prompt_tokens: 0.5 + 0.01 * prompt_tokens
    rig.add(make_request("decode", 1, 3))
    rig.run()
    for n in range(2):
        rig.add(make_request(f"prompt {n}", 100, 1))
        rig.run()
    rig.finished.clear()
    # An engine without work refuses nothing; this one is busy.
    rig.add(make_request("busy", 1, 200))
    rig.step()
    return rig


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "stopping", "needed"),
    [
        (100, 4, {}, 3.0),
        (1, 20, {}, 10.01),
        (1, 20, {"eos_token_ids": (9,)}, 0.51),
        (1, 20, {"stop_token_ids": (9,)}, 0.51),
        (1, 20, {"eos_token_ids": (9,), "min_tokens": 6}, 3.01),
    ],
)
def test_a_hopeless_deadline_is_refused_at_once_and_a_hopeful_one_is_not(
    make_rig: MakeRig,
    make_request: MakeRequest,
    prompt: int,
    max_tokens: int,
    stopping: dict[str, Any],
    needed: float,
) -> None:
    """An end token may come at once, so that only min_tokens count where there is one."""
    for share, refused in ((0.95, True), (1.05, False)):
        rig = measured(make_rig, make_request)
        deadline = rig.now + share * needed
        rig.add(make_request("a", prompt, max_tokens, deadline=deadline, **stopping))
        rig.schedule()
        assert ("a" in rig.finished) == refused, share
        if refused:
            one = rig.finished["a"]
            assert one.reason is FinishReason.REFUSED
            assert one.retry_after_s == pytest.approx(needed, rel=0.02)
            assert one.scheduled_at is None
            assert one.message


def test_prompts_that_come_before_count(make_rig: MakeRig, make_request: MakeRequest) -> None:
    for before, refused in (("before", True), ("behind", False)):
        rig = measured(make_rig, make_request)
        priority = 1 if before == "before" else -1
        rig.add(make_request("other", 200, 1, priority=priority))
        rig.add(make_request("a", 10, 1, deadline=rig.now + 2.0))
        rig.schedule()
        assert ("a" in rig.finished) == refused, before


@pytest.mark.parametrize("salt", ["same", "other"])
def test_a_prompt_that_is_cached_needs_no_time(
    make_rig: MakeRig, make_request: MakeRequest, salt: str
) -> None:
    rig = measured(make_rig, make_request)
    rig.add(make_request("first", 200, 1, cache_salt="same"))
    while "first" not in rig.finished:
        rig.step()
    rig.add(make_request("a", 200, 1, cache_salt=salt, deadline=rig.now + 1.0))
    rig.schedule()
    assert ("a" in rig.finished) == (salt == "other")


def test_choices_of_others_count_their_prompt_once(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = measured(make_rig, make_request)
    rig.add(make_request("other", 100, 1, choices=8, priority=1))
    rig.add(make_request("a", 10, 1, deadline=rig.now + 4.0))
    rig.schedule()
    assert "a" not in rig.finished, "100 + 10 prompt tokens and a step take 1.6 s"


def test_a_deadline_is_hopeful_where_nothing_was_measured(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig()
    rig.add(make_request("busy"), make_request("a", 30, 30, deadline=0.001))
    rig.schedule()
    assert rig.reasons() == {}


def test_an_idle_engine_refuses_no_deadline(make_rig: MakeRig, make_request: MakeRequest) -> None:
    """So that a speed that was measured badly is measured anew."""
    rig = measured(make_rig, make_request)
    rig.run()
    rig.add(make_request("a", 100, 20, deadline=rig.now + 0.1))
    assert rig.schedule() == {"a": 100}


def test_all_choices_of_a_hopeless_request_are_refused_and_its_id_is_free(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = measured(make_rig, make_request)
    rig.add(make_request("a", 100, 20, choices=3, deadline=rig.now + 0.1))
    assert rig.scheduler.stats().queued == 0
    rig.schedule()
    reasons = {name: reason for name, reason in rig.reasons().items() if name != "busy"}
    assert reasons == dict.fromkeys(["a", "a.1", "a.2"], FinishReason.REFUSED)


# --- chunks of prompts


def slow(make_rig: MakeRig, make_request: MakeRequest, max_gap_s: float) -> Any:
    """A rig that knows its speeds: 0.01 s for each step, 0.001 s for each prompt token."""
    rig = make_rig(blocks=256, context_length=1024, token_budget=512, max_gap_s=max_gap_s)
    rig.cost = lambda decodes, prompt_tokens: 0.01 + 0.001 * prompt_tokens
    rig.add(make_request("decode", 1, 3))
    rig.run()
    rig.add(make_request("prompt", 400, 1))
    rig.run()
    return rig


def test_chunks_shrink_to_bound_the_gap_while_others_decode(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = slow(make_rig, make_request, max_gap_s=0.11)
    rig.add(make_request("talker", 1, 60))
    rig.step()
    rig.add(make_request("reader", 400, 2))
    lengths = []
    while "reader" not in rig.tokens:
        began = rig.now
        lengths.append(rig.schedule()["reader"])
        rig.commit()
        assert rig.now - began <= 0.11 + 1e-9
    assert sum(lengths) == 400
    assert len(rig.tokens["talker"]) >= 4
    assert lengths[0] >= 90, "no smaller than the gap asks for"


def test_chunks_of_several_prompts_share_one_gap(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = slow(make_rig, make_request, max_gap_s=0.11)
    rig.add(make_request("talker", 1, 60))
    rig.step()
    rig.add(*(make_request(name, 60, 2) for name in "abc"))
    lengths = rig.schedule()
    assert sum(n for name, n in lengths.items() if name != "talker") <= 100


def test_chunks_are_not_shrunk_where_nothing_decodes(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = slow(make_rig, make_request, max_gap_s=0.11)
    rig.add(make_request("a", 400, 2), make_request("b", 200, 2))
    assert rig.schedule() == {"a": 400, "b": 112}


def test_prompts_go_on_however_slow_they_are(make_rig: MakeRig, make_request: MakeRequest) -> None:
    rig = slow(make_rig, make_request, max_gap_s=0.001)
    rig.add(make_request("talker", 1, 200))
    rig.step()
    rig.add(make_request("reader", 40, 2))
    lengths = []
    while "reader" not in rig.tokens:
        lengths.append(rig.step()["reader"])
    assert lengths == [4] * 10, "a block at a time"


def test_before_it_is_measured_the_budget_alone_bounds_a_step(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(blocks=64, context_length=256, token_budget=64, max_gap_s=0.001)
    rig.add(make_request("talker", 1, 20))
    rig.step()
    rig.add(make_request("reader", 100, 2))
    assert rig.step() == {"talker": 1, "reader": 63}


@pytest.mark.parametrize("decode_s", [0.01, 0.05])
@pytest.mark.parametrize("when", ["first", "later"])
def test_one_slow_step_does_not_shrink_chunks_for_ever(
    make_rig: MakeRig, make_request: MakeRequest, when: str, decode_s: float
) -> None:
    """While others decode all the time, small chunks are all there is to measure."""
    rig = make_rig(blocks=512, block_size=16, context_length=4096, token_budget=512, max_gap_s=0.1)
    rig.cost = lambda decodes, prompt_tokens: decode_s + 0.0001 * prompt_tokens
    rig.add(make_request("talker", 1, 1000))
    rig.step()
    rig.step()
    for n in range(4 if when == "later" else 0):
        rig.add(make_request(f"{n}", 300, 1))
        rig.step()
    usual, rig.cost = rig.cost, lambda decodes, prompt_tokens: 5.0
    rig.add(make_request("held up", 300, 1))
    rig.step()
    rig.cost = usual
    rig.add(make_request("reader", 3000, 1))
    lengths = [rig.step().get("reader", 0) for _ in range(60)]
    assert max(lengths) > 200
