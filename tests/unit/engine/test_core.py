"""The core: schedule, run, commit, with a runner whose tokens are known by hand."""

from collections.abc import Callable
from typing import Protocol

import pytest

from engine.config import SchedulerConfig
from engine.core import EngineCore
from engine.endings import NOTHING_LEFT
from engine.errors import InvalidRequest
from engine.figures import StepFigures
from engine.testing import ArithmeticRunner
from engine.types import (
    FinishReason,
    PromptLogprobs,
    Request,
    ScheduledBatch,
    StepOutput,
    StepResult,
    TokenLogprobs,
)

MakeRequest = Callable[..., Request]


class Clock(Protocol):
    now: float

    def __call__(self) -> float: ...


class Faulty(ArithmeticRunner):
    """Fails at the steps named; says that logits of the sequences named are not finite."""

    def __init__(self, fail_at: set[int] | None = None, broken: set[str] | None = None) -> None:
        super().__init__()
        self.fail_at = fail_at or set()
        self.broken = broken or set()

    def run(self, batch: ScheduledBatch) -> StepResult:
        result = super().run(batch)
        if len(self.steps) in self.fail_at:
            raise RuntimeError("the kernel fell over")
        pairs = zip(batch.items, result.tokens, strict=True)
        return StepResult([-1 if i.sequence.id in self.broken else token for i, token in pairs])


def drain(core: EngineCore, steps: int = 500) -> dict[str, tuple[list[int], FinishReason]]:
    """Tokens and reason of each choice; fails where one ends twice or never."""
    tokens: dict[str, list[int]] = {}
    ended: dict[str, FinishReason] = {}
    for _ in range(steps):
        if not core.has_work:
            return {name: (tokens.get(name, []), reason) for name, reason in ended.items()}
        gather(core.step(), tokens, ended)
    raise AssertionError("the core never came to rest")


def gather(
    output: StepOutput, tokens: dict[str, list[int]], ended: dict[str, FinishReason]
) -> None:
    for event in output.tokens:
        name = f"{event.id}.{event.choice}" if event.choice else event.id
        assert name not in ended
        tokens.setdefault(name, []).append(event.token)
    for one in output.finished:
        name = f"{one.id}.{one.choice}" if one.choice else one.id
        assert name not in ended
        ended[name] = one.reason


@pytest.mark.parametrize("token_budget", [4, 7, 64])
@pytest.mark.parametrize("num_blocks", [12, 64])
def test_tokens_are_those_of_the_sequence_alone(
    make_request: MakeRequest, token_budget: int, num_blocks: int
) -> None:
    runner = ArithmeticRunner(num_blocks=num_blocks)
    core = EngineCore(runner, SchedulerConfig(max_sequences=4, token_budget=token_budget))
    requests = [make_request(str(n), 1 + 3 * n % 20, 1 + 5 * n % 17) for n in range(12)]
    for request in requests:
        core.submit(request)
    found = drain(core)
    for request in requests:
        wanted = runner.expected(request.prompt, request.stopping.max_tokens)
        assert found[request.id] == (wanted, FinishReason.LENGTH)
    stats = core.stats()
    assert (stats.blocks_used, stats.blocks_free + stats.blocks_cached) == (0, num_blocks)


def test_a_raising_runner_ends_its_batch_only(
    make_request: MakeRequest, caplog: pytest.LogCaptureFixture
) -> None:
    runner = Faulty(fail_at={2})
    core = EngineCore(runner, SchedulerConfig(max_sequences=2, token_budget=16))
    for name in "abc":
        core.submit(make_request(name))
    found = drain(core)
    assert [found[name][1] for name in "ab"] == [FinishReason.ERROR] * 2
    assert found["c"] == (runner.expected([1, 2, 3], 4), FinishReason.LENGTH)
    assert "the kernel fell over" in caplog.text
    core.submit(make_request("a"))
    assert drain(core)["a"] == (runner.expected([1, 2, 3], 4), FinishReason.LENGTH)
    assert core.stats().blocks_used == 0


def test_a_failed_step_keeps_what_ended_before_it(make_request: MakeRequest) -> None:
    core = EngineCore(Faulty(fail_at={1}), SchedulerConfig())
    core.submit(make_request("gone"))
    core.submit(make_request("unlucky"))
    core.cancel("gone")
    output = core.step()
    assert [(one.id, one.reason) for one in output.finished] == [
        ("gone", FinishReason.CANCELLED),
        ("unlucky", FinishReason.ERROR),
    ]


def test_the_message_of_a_failed_step_tells_no_internals(make_request: MakeRequest) -> None:
    core = EngineCore(Faulty(fail_at={1}), SchedulerConfig())
    core.submit(make_request("a"))
    (finished,) = core.step().finished
    assert finished.message
    assert "fell over" not in finished.message


def test_figures_come_with_the_events_of_their_step(make_request: MakeRequest) -> None:
    class Seeing(ArithmeticRunner):
        def run(self, batch: ScheduledBatch) -> StepResult:
            result = super().run(batch)
            result.figures = StepFigures(rows=len(self.steps))
            return result

    core = EngineCore(Seeing(), SchedulerConfig())
    core.submit(make_request("a", 3, 2))
    seen = []
    while core.has_work:
        seen.append(core.step().figures)
    assert seen == [StepFigures(rows=1), StepFigures(rows=2)]
    assert core.step().figures is None


def test_what_leaves_no_token_is_the_requests_own_fault(make_request: MakeRequest) -> None:
    class Empty(ArithmeticRunner):
        def run(self, batch: ScheduledBatch) -> StepResult:
            return StepResult([NOTHING_LEFT for _ in super().run(batch).tokens])

    core = EngineCore(Empty(), SchedulerConfig())
    core.submit(make_request("a"))
    (end,) = core.step().finished
    assert end.reason is FinishReason.INVALID
    assert end.message == "it leaves no token to choose"


def test_broken_logits_end_their_own_request(make_request: MakeRequest) -> None:
    runner = Faulty(broken={"b"})
    core = EngineCore(runner, SchedulerConfig())
    for name in "abc":
        core.submit(make_request(name))
    found = drain(core)
    assert found.pop("b") == ([], FinishReason.ERROR)
    assert all(
        one == (runner.expected([1, 2, 3], 4), FinishReason.LENGTH) for one in found.values()
    )


def test_a_refused_request_leaves_no_trace(make_request: MakeRequest) -> None:
    core = EngineCore(ArithmeticRunner(), SchedulerConfig())
    with pytest.raises(InvalidRequest):
        core.submit(make_request("a", 200, 200))
    assert not core.has_work
    assert core.stats().queued == 0


def test_a_step_without_work_says_nothing() -> None:
    core = EngineCore(ArithmeticRunner(), SchedulerConfig())
    assert not core.step()


def test_the_clock_given_decides_deadlines(make_request: MakeRequest, clock: Clock) -> None:
    core = EngineCore(ArithmeticRunner(), SchedulerConfig(), clock)
    core.submit(make_request("a", 3, 50, deadline=10.0))
    for _ in range(5):
        assert not core.step().finished
    clock.now = 10.0
    (finished,) = core.step().finished
    assert finished.reason is FinishReason.DEADLINE
    assert finished.finished_at == 10.0


def test_the_report_has_the_longest_sequence_that_fits() -> None:
    runner = ArithmeticRunner(num_blocks=5, block_size=4, context_length=256)
    assert EngineCore(runner, SchedulerConfig()).report().max_sequence_tokens == 20


def test_tokens_are_the_same_with_and_without_a_cached_prefix(make_request: MakeRequest) -> None:
    runner = ArithmeticRunner()
    core = EngineCore(runner, SchedulerConfig())
    prompt = list(range(1, 22))
    wanted = (runner.expected(prompt, 9), FinishReason.LENGTH)
    for name in ("miss", "hit"):
        core.submit(make_request(name, prompt, 9, cache_salt=""))
        assert drain(core) == {name: wanted}
    assert core.stats().cached_tokens == 20


def test_every_choice_gets_its_tokens_and_one_end(make_request: MakeRequest) -> None:
    runner = ArithmeticRunner()
    core = EngineCore(runner, SchedulerConfig())
    core.submit(make_request("a", 9, 6, choices=3))
    wanted = (runner.expected(list(range(1, 10)), 6), FinishReason.LENGTH)
    assert drain(core) == dict.fromkeys(["a", "a.1", "a.2"], wanted)


def test_cancel_of_a_choice_leaves_the_others(make_request: MakeRequest) -> None:
    core = EngineCore(ArithmeticRunner(), SchedulerConfig())
    core.submit(make_request("a", 9, 6, choices=3))
    core.step()
    core.cancel("a", 1)
    reasons = {name: reason for name, (_, reason) in drain(core).items()}
    assert reasons == {
        "a": FinishReason.LENGTH,
        "a.1": FinishReason.CANCELLED,
        "a.2": FinishReason.LENGTH,
    }


def test_the_clock_measures_steps_and_refuses_what_cannot_be_met(
    make_request: MakeRequest, clock: Clock
) -> None:
    """The deadline of a request is held against what the steps took by the clock given."""

    class Slow(ArithmeticRunner):
        def run(self, batch: ScheduledBatch) -> StepResult:
            clock.now += 1.0
            return super().run(batch)

    core = EngineCore(Slow(), SchedulerConfig(), clock)
    core.submit(make_request("busy", 3, 20))
    for _ in range(3):
        core.step()
    core.submit(make_request("hopeless", 3, 20, deadline=clock.now + 10.0))
    core.submit(make_request("hopeful", 3, 5, deadline=clock.now + 10.0))
    found = drain(core)
    assert found["hopeless"] == ([], FinishReason.REFUSED)
    assert found["hopeful"][1] is FinishReason.LENGTH
    assert found["busy"][1] is FinishReason.LENGTH


def test_a_refusal_is_told_by_the_next_step(make_request: MakeRequest, clock: Clock) -> None:
    core = EngineCore(ArithmeticRunner(), SchedulerConfig(max_sequences=1), clock)
    core.submit(make_request("a", 3, 50))
    core.submit(make_request("b", 3, 50, queue_deadline=5.0))
    core.step()
    clock.now = 5.0
    (refused,) = core.step().finished
    assert (refused.id, refused.reason) == ("b", FinishReason.REFUSED)
    assert refused.retry_after_s > 0


def test_prompt_logprobs_of_the_runner_come_out(make_request: MakeRequest) -> None:
    prompts = [PromptLogprobs("a", [TokenLogprobs(2, -0.5, 1, [])])]
    logprobs = TokenLogprobs(7, -0.1, 1, [(7, -0.1)])

    class Telling(ArithmeticRunner):
        def run(self, batch: ScheduledBatch) -> StepResult:
            return StepResult(super().run(batch).tokens, {1: logprobs}, prompts)

    core = EngineCore(Telling(), SchedulerConfig())
    for name in "ab":
        core.submit(make_request(name))
    output = core.step()
    assert output.prompts == prompts
    assert [event.logprobs for event in output.tokens] == [None, logprobs]
