"""The scheduler: who runs in a step, and how a request ends."""

from collections.abc import Callable
from typing import Any

import pytest

from engine.config import SchedulerConfig
from engine.errors import InvalidRequest
from engine.types import FinishReason, Request, StepResult

MakeRequest = Callable[..., Request]
MakeRig = Callable[..., Any]  # the Rig of conftest.py


def test_requests_run_in_order_of_arrival(make_rig: MakeRig, make_request: MakeRequest) -> None:
    rig = make_rig(max_sequences=2)
    rig.add(*(make_request(name, 3, 2) for name in "abcd"))
    assert list(rig.step()) == ["a", "b"]
    rig.run()
    assert list(rig.finished) == ["a", "b", "c", "d"]


def test_decodes_come_before_prompts(make_rig: MakeRig, make_request: MakeRequest) -> None:
    rig = make_rig(token_budget=8)
    rig.add(make_request("old", 12, 4), make_request("late", 2, 4))
    assert rig.step() == {"old": 8}
    assert rig.step() == {"old": 4, "late": 2}
    rig.add(make_request("new", 9, 4))
    assert list(rig.step().items()) == [("old", 1), ("late", 1), ("new", 6)]
    assert list(rig.step().items()) == [("old", 1), ("late", 1), ("new", 3)]


def test_a_long_prompt_runs_in_chunks_and_samples_at_its_end(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(token_budget=8)
    rig.add(make_request("a", 21, 2))
    lengths = []
    while not rig.finished:
        lengths.append(rig.step()["a"])
        assert bool(rig.tokens) == (sum(lengths) >= 21)
    assert lengths == [8, 8, 5, 1]
    assert rig.tokens == {"a": [7, 7]}


def test_no_step_exceeds_the_token_budget(make_rig: MakeRig, make_request: MakeRequest) -> None:
    rig = make_rig(token_budget=5, max_sequences=5, blocks=64)
    rig.add(*(make_request(name, 7, 6) for name in "abcdefgh"))
    while rig.scheduler.has_work:
        assert sum(rig.step().values()) <= 5


def test_no_step_runs_more_than_max_sequences(make_rig: MakeRig, make_request: MakeRequest) -> None:
    rig = make_rig(max_sequences=3)
    rig.add(*(make_request(name, 2, 3) for name in "abcdefg"))
    while rig.scheduler.has_work:
        assert len(rig.schedule()) <= 3
        assert rig.scheduler.stats().running <= 3
        rig.commit()


def test_admission_needs_room_for_the_whole_prompt(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(blocks=4, token_budget=8)
    rig.add(make_request("a", 9, 3), make_request("b", 5, 3))
    rig.step()
    assert list(rig.step()) == ["a"], "one free block is not enough for 5 tokens"
    rig.run()
    assert rig.finished["b"].preemptions == 0


def test_nobody_overtakes_the_head_of_the_queue(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(blocks=4)
    rig.add(make_request("a", 9, 3), make_request("big", 8, 3), make_request("small", 1, 1))
    assert list(rig.step()) == ["a"]
    rig.run()
    assert next(iter(rig.finished)) == "a"
    big, small = rig.finished["big"], rig.finished["small"]
    assert big.scheduled_at is not None
    assert small.scheduled_at is not None
    assert big.scheduled_at <= small.scheduled_at


def test_of_equals_the_last_one_gives_way_and_keeps_its_place(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(blocks=8)
    rig.add(*(make_request(name, 8, 8) for name in "abc"))
    assert list(rig.step()) == ["a", "b", "c"]
    rig.add(make_request("d", 1, 1))
    lengths = rig.step()
    assert list(lengths) == ["a", "b"], "a, b and c each need a third block; two are free"
    assert rig.scheduler.stats().preemptions == 1
    rig.run()
    assert [rig.finished[name].preemptions for name in "ab"] == [0, 0]
    assert rig.finished["c"].preemptions >= 1
    scheduled = [rig.finished[name].scheduled_at for name in "cd"]
    assert scheduled[0] == 0.0
    assert scheduled[1] is not None
    assert scheduled[1] > 1.0, "d came after c and must not take its blocks"
    assert rig.reasons() == dict.fromkeys("abcd", FinishReason.LENGTH)
    assert all(len(rig.tokens[name]) == 8 for name in "abc")


def test_the_last_one_is_the_one_that_arrived_last(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    """A request that took long to tokenise comes later than it arrived."""
    rig = make_rig(blocks=4)
    first, second = make_request("first", 7, 6), make_request("second", 7, 6)
    rig.add(second, first)
    rig.run()
    assert rig.finished["first"].preemptions == 0
    assert rig.finished["second"].preemptions > 0


def test_a_preempted_sequence_computes_again_what_its_blocks_no_longer_hold(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(blocks=4)
    rig.add(make_request("a", 7, 6), make_request("b", 7, 6))
    rig.step()
    rig.step()
    lengths = rig.step()
    assert lengths == {"a": 1}
    while lengths == {"a": 1}:
        lengths = rig.step()
    assert lengths == {"b": 7 + 2 - 4}, "a took the second of its two full blocks"
    assert rig.tokens["b"] == [7] * 3
    rig.run()
    assert rig.finished["b"].preemptions == 1
    assert rig.finished["b"].recomputed == 8


def test_prompt_tokens_count_once_whatever_is_preempted(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(blocks=6)
    rig.add(*(make_request(name, 8, 8) for name in "abc"))
    rig.run()
    stats = rig.scheduler.stats()
    assert stats.preemptions > 0
    assert (stats.prompt_tokens, stats.generated_tokens) == (24, 24)
    assert sum(one.preemptions for one in rig.finished.values()) == stats.preemptions


@pytest.mark.parametrize("steps", [0, 1, 3], ids=["waiting", "prefill", "decode"])
def test_cancel_ends_a_request_within_a_step(
    make_rig: MakeRig, make_request: MakeRequest, steps: int
) -> None:
    rig = make_rig(token_budget=8)
    rig.add(make_request("a", 12, 9))
    for _ in range(steps):
        rig.step()
    rig.scheduler.cancel("a")
    assert rig.schedule() == {}
    assert rig.reasons() == {"a": FinishReason.CANCELLED}
    assert rig.blocks.available_blocks == 16
    assert not rig.scheduler.has_work
    assert len(rig.tokens.get("a", [])) == max(0, steps - 1)


def test_cancel_in_the_queue_leaves_the_others_alone(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(max_sequences=1)
    rig.add(*(make_request(name) for name in "abc"))
    rig.step()
    rig.scheduler.cancel("b")
    rig.run()
    assert rig.reasons() == {
        "b": FinishReason.CANCELLED,
        "a": FinishReason.LENGTH,
        "c": FinishReason.LENGTH,
    }


def test_cancel_twice_or_of_unknown_ids_does_no_harm(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig()
    rig.scheduler.cancel("nobody")
    rig.add(make_request("a"))
    rig.scheduler.cancel("a")
    rig.scheduler.cancel("a")
    rig.schedule()
    rig.scheduler.cancel("a")
    rig.schedule()
    assert rig.reasons() == {"a": FinishReason.CANCELLED}


def test_an_id_is_free_again_after_its_end(make_rig: MakeRig, make_request: MakeRequest) -> None:
    rig = make_rig()
    rig.add(make_request("a", 3, 1))
    rig.scheduler.cancel("a")
    rig.step()
    del rig.finished["a"]
    rig.add(make_request("a", 3, 1))
    rig.run()
    assert rig.reasons() == {"a": FinishReason.LENGTH}


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"deadline": 2.0}, FinishReason.DEADLINE),
        ({"time_limit": 2.0}, FinishReason.TIME_LIMIT),
        ({"deadline": 2.0, "time_limit": 2.0}, FinishReason.DEADLINE),
        ({"deadline": 9.0, "time_limit": 2.0}, FinishReason.TIME_LIMIT),
    ],
)
def test_time_ends_a_request(
    make_rig: MakeRig, make_request: MakeRequest, limits: dict[str, float], reason: FinishReason
) -> None:
    rig = make_rig()
    rig.add(make_request("a", 3, 40, **limits))
    rig.run()
    assert rig.reasons() == {"a": reason}
    assert rig.tokens == {"a": [7, 7]}
    assert rig.finished["a"].finished_at == 2.0


def test_time_ends_a_request_that_still_waits(make_rig: MakeRig, make_request: MakeRequest) -> None:
    rig = make_rig(max_sequences=1)
    rig.add(make_request("a", 3, 9), make_request("b", 3, 9, time_limit=2.0))
    rig.run()
    assert rig.reasons() == {"b": FinishReason.TIME_LIMIT, "a": FinishReason.LENGTH}
    assert rig.finished["b"].scheduled_at is None
    assert rig.finished["b"].first_token_at is None


@pytest.mark.parametrize(
    ("stopping", "max_tokens", "reason", "stop_id"),
    [
        ({"eos_token_ids": (7,)}, 9, FinishReason.EOS, 7),
        ({"stop_token_ids": (7,)}, 9, FinishReason.STOP, 7),
        ({"eos_token_ids": (7,), "stop_token_ids": (7,)}, 9, FinishReason.EOS, 7),
        ({"eos_token_ids": (5, 7)}, 1, FinishReason.EOS, 7),
        ({"stop_token_ids": (7,)}, 1, FinishReason.STOP, 7),
        ({"eos_token_ids": (5,), "stop_token_ids": (6,)}, 1, FinishReason.LENGTH, None),
    ],
)
def test_a_token_ends_a_request_by_eos_then_stop_id_then_length(
    make_rig: MakeRig,
    make_request: MakeRequest,
    stopping: dict[str, tuple[int, ...]],
    max_tokens: int,
    reason: FinishReason,
    stop_id: int | None,
) -> None:
    rig = make_rig()
    rig.add(make_request("a", 3, max_tokens, **stopping))
    rig.step()
    assert rig.finished["a"].reason is reason
    assert rig.finished["a"].stop_token_id == stop_id
    assert rig.tokens == {"a": [7]}, "the token that ends it is given out too"
    assert rig.blocks.available_blocks == 16


def test_a_prompt_that_holds_the_stop_id_does_not_end(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig()
    rig.add(make_request("a", [5, 5, 5], 2, stop_token_ids=(5,), eos_token_ids=(5,)))
    rig.run()
    assert rig.reasons() == {"a": FinishReason.LENGTH}


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "field"),
    [
        (0, 4, "input"),
        (3, 0, "input"),
        (3, -1, "input"),
        (60, 5, "stopping.max_tokens"),
        (65, 1, "stopping.max_tokens"),
    ],
)
def test_what_can_never_run_is_refused(
    make_rig: MakeRig, make_request: MakeRequest, prompt: int, max_tokens: int, field: str
) -> None:
    rig = make_rig(context_length=64)
    with pytest.raises(InvalidRequest) as caught:
        rig.add(make_request("a", prompt, max_tokens))
    assert caught.value.field == field
    assert not rig.scheduler.has_work
    rig.add(make_request("a"))


@pytest.mark.parametrize(("blocks", "context", "most"), [(4, 64, 16), (16, 20, 20)])
def test_the_longest_request_is_bound_by_pool_and_context(
    make_rig: MakeRig, make_request: MakeRequest, blocks: int, context: int, most: int
) -> None:
    rig = make_rig(blocks=blocks, context_length=context)
    assert rig.scheduler.max_sequence_tokens == most
    with pytest.raises(InvalidRequest):
        rig.add(make_request("long", most - 3, 4))
    rig.add(make_request("just", most - 4, 4))
    rig.run()
    assert rig.reasons() == {"just": FinishReason.LENGTH}


def test_a_live_id_is_refused(make_rig: MakeRig, make_request: MakeRequest) -> None:
    rig = make_rig()
    rig.add(make_request("a"))
    with pytest.raises(InvalidRequest) as caught:
        rig.add(make_request("a"))
    assert caught.value.field == "request_id"
    rig.step()
    with pytest.raises(InvalidRequest):
        rig.add(make_request("a"))


def test_a_failed_step_ends_its_batch_and_nothing_else(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig(max_sequences=2)
    rig.add(*(make_request(name) for name in "abc"))
    rig.step()
    rig.schedule()
    ended = rig.scheduler.fail(rig.batch, "out of order", rig.now)
    assert [(one.id, one.reason, one.message) for one in ended] == [
        ("a", FinishReason.ERROR, "out of order"),
        ("b", FinishReason.ERROR, "out of order"),
    ]
    rig.scheduler.check_invariants()
    assert rig.blocks.available_blocks == 16
    rig.run()
    assert rig.reasons() == {"c": FinishReason.LENGTH}


def test_logits_that_are_not_finite_end_only_their_row(
    make_rig: MakeRig, make_request: MakeRequest
) -> None:
    rig = make_rig()
    rig.add(make_request("a", 3, 2), make_request("b", 3, 2))
    rig.schedule()
    output = rig.scheduler.commit(rig.batch, StepResult([-1, 7]), rig.now)
    assert [(one.id, one.reason) for one in output.finished] == [("a", FinishReason.ERROR)]
    assert "finite" in output.finished[0].message
    assert [(one.id, one.token) for one in output.tokens] == [("b", 7)]
    rig.scheduler.check_invariants()


def test_times_are_those_of_the_first_schedule_and_the_first_token(
    make_rig: MakeRig,
    make_request: MakeRequest,
) -> None:
    rig = make_rig(token_budget=8)
    rig.add(make_request("quick", 3, 3), make_request("slow", 12, 3))
    rig.run()
    quick, slow = rig.finished["quick"], rig.finished["slow"]
    assert (quick.scheduled_at, quick.first_token_at, quick.finished_at) == (0.0, 0.0, 2.0)
    assert (slow.scheduled_at, slow.first_token_at, slow.finished_at) == (0.0, 1.0, 3.0)


def test_stats_count_what_lives(make_rig: MakeRig, make_request: MakeRequest) -> None:
    rig = make_rig(max_sequences=2)
    rig.add(*(make_request(name, 5, 3) for name in "abc"))
    assert rig.scheduler.stats().queued == 3
    rig.step()
    stats = rig.scheduler.stats()
    assert (stats.queued, stats.running) == (1, 2)
    assert (stats.blocks_used, stats.blocks_free) == (4, 12)
    assert (stats.prompt_tokens, stats.generated_tokens, stats.preemptions) == (10, 2, 0)
    rig.run()
    stats = rig.scheduler.stats()
    assert (stats.queued, stats.running, stats.blocks_used) == (0, 0, 0)
    assert (stats.blocks_free, stats.blocks_cached) == (13, 3), "one full block of each"
    assert (stats.prompt_tokens, stats.generated_tokens) == (15, 9)


@pytest.mark.parametrize("bounds", [(0, 4), (5, 4), (-1, -1), (0, 0)])
def test_a_config_without_room_for_one_token_each_is_refused(bounds: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="max_sequences"):
        SchedulerConfig(max_sequences=bounds[0], token_budget=bounds[1])
