"""The loop: messages in, events out, until it is told to stop."""

from collections.abc import Callable

from engine.config import SchedulerConfig
from engine.core import EngineCore
from engine.loop import run_loop
from engine.messages import Cancel, Events, FromEngine, GetStats, Shutdown, Stats, Submit, ToEngine
from engine.testing import ArithmeticRunner
from engine.types import FinishReason, Request

MakeRequest = Callable[..., Request]


def play(script: list[list[ToEngine]]) -> tuple[list[FromEngine], list[bool]]:
    """Hands out ``script`` round by round, then ``Shutdown``; also tells who offered to wait."""
    sent: list[FromEngine] = []
    waits: list[bool] = []
    rounds = iter(script)

    def receive(wait: bool) -> list[ToEngine]:
        waits.append(wait)
        return next(rounds, [Shutdown()])

    run_loop(EngineCore(ArithmeticRunner(), SchedulerConfig()), receive, sent.append)
    return sent, waits


def finished(sent: list[FromEngine]) -> dict[str, FinishReason]:
    events = [one for message in sent if isinstance(message, Events) for one in [message.output]]
    return {one.id: one.reason for output in events for one in output.finished}


def test_a_submitted_request_is_answered_by_its_events(make_request: MakeRequest) -> None:
    sent, _ = play([[Submit(make_request("a", 3, 2))], [], []])
    tokens = [e.token for m in sent if isinstance(m, Events) for e in m.output.tokens]
    assert tokens == ArithmeticRunner().expected([1, 2, 3], 2)
    assert finished(sent) == {"a": FinishReason.LENGTH}


def test_it_waits_for_messages_only_without_work(make_request: MakeRequest) -> None:
    _, waits = play([[], [Submit(make_request("a", 3, 2))], [], []])
    assert waits == [True, True, False, True, True]


def test_a_refused_request_is_answered_too(make_request: MakeRequest) -> None:
    sent, _ = play([[Submit(make_request("long", 300, 300)), Submit(make_request("a", 3, 1))]])
    assert finished(sent) == {"long": FinishReason.ERROR, "a": FinishReason.LENGTH}


def test_cancel_ends_a_request(make_request: MakeRequest) -> None:
    sent, _ = play([[Submit(make_request("a", 3, 90))], [Cancel("a"), Cancel("nobody")]])
    assert finished(sent) == {"a": FinishReason.CANCELLED}


def test_cancel_of_a_choice_leaves_the_others(make_request: MakeRequest) -> None:
    script: list[list[ToEngine]] = [[Submit(make_request("a", 3, 4, choices=2))], [Cancel("a", 1)]]
    sent, _ = play([*script, *([] for _ in range(4))])
    outputs = [message.output for message in sent if isinstance(message, Events)]
    ends = {one.choice: one.reason for output in outputs for one in output.finished}
    assert ends == {0: FinishReason.LENGTH, 1: FinishReason.CANCELLED}


def test_a_refused_request_ends_each_of_its_choices(make_request: MakeRequest) -> None:
    sent, _ = play([[Submit(make_request("long", 300, 300, choices=3))]])
    outputs = [message.output for message in sent if isinstance(message, Events)]
    ends = [(one.choice, one.reason) for output in outputs for one in output.finished]
    assert ends == [(choice, FinishReason.ERROR) for choice in range(3)]


def test_stats_answer_between_steps(make_request: MakeRequest) -> None:
    sent, _ = play([[Submit(make_request("a", 3, 90)), GetStats()], [GetStats()]])
    stats = [message.stats for message in sent if isinstance(message, Stats)]
    assert [(one.queued, one.running) for one in stats] == [(1, 0), (0, 1)]


def test_shutdown_ends_it_with_work_left(make_request: MakeRequest) -> None:
    sent, _ = play([[Submit(make_request("a", 3, 90)), Shutdown(), GetStats()]])
    assert sent == []
