"""Speculation: who gets drafts, what is taken of them, and that the output stays the same."""

from collections.abc import Callable

import pytest

from engine.config import SchedulerConfig
from engine.core import EngineCore
from engine.testing import ArithmeticRunner
from engine.types import (
    Constraint,
    FinishReason,
    Request,
    SamplingParams,
    ScheduledBatch,
    ScheduledSequence,
    Sequence,
    StepOutput,
    StepResult,
    StoppingParams,
)

MakeRequest = Callable[..., Request]
CIRCLE = [5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7]


class Circle(ArithmeticRunner):
    """5, 6, 7, 8, 5 and so on, whatever came before; at ``surprises`` another token comes."""

    def __init__(self, surprises: tuple[int, ...] = (), num_blocks: int = 64) -> None:
        super().__init__(num_blocks)
        self.surprises = surprises

    def next_token(self, tokens: list[int]) -> int:
        return 9 if len(tokens) in self.surprises else 5 + len(tokens) % 4


def run(core: EngineCore) -> tuple[list[int], list[StepOutput]]:
    outputs = []
    while core.has_work:
        outputs.append(core.step())
        core._scheduler.check_invariants()
    return [event.token for output in outputs for event in output.tokens], outputs


def make_core(runner: ArithmeticRunner, most: int = 4, **config: int) -> EngineCore:
    bounds = {"max_sequences": 16, "token_budget": 64, **config}
    return EngineCore(runner, SchedulerConfig(speculative_tokens=most, **bounds))


@pytest.mark.parametrize("surprises", [(), (14,), (13, 17, 18), tuple(range(11, 60, 3))])
@pytest.mark.parametrize("max_tokens", [1, 2, 5, 30])
def test_the_output_is_that_of_plain_decoding(
    make_request: MakeRequest, surprises: tuple[int, ...], max_tokens: int
) -> None:
    plain, drafting = (make_core(Circle(surprises), most) for most in (0, 4))
    for core in (plain, drafting):
        core.submit(make_request("a", CIRCLE, max_tokens))
    wanted, plain_steps = run(plain)
    found, steps = run(drafting)
    assert found == wanted
    assert len(found) == max_tokens
    assert len(steps) <= len(plain_steps)


def test_right_drafts_save_steps(make_request: MakeRequest) -> None:
    core = make_core(Circle())
    core.submit(make_request("a", CIRCLE, 21))
    tokens, steps = run(core)
    assert len(tokens) == 21
    assert len(steps) == 5  # one for the prompt, then five tokens a step
    stats = core.stats()
    assert stats.drafted_tokens == stats.accepted_tokens == 16
    assert stats.generated_tokens == 21


def test_a_wrong_draft_costs_itself_and_those_after_it(make_request: MakeRequest) -> None:
    runner = Circle(surprises=(14,))
    core = make_core(runner)
    core.submit(make_request("a", CIRCLE, 8))
    core.step()
    output = core.step()  # at 12, 13, 14: the third is not what was drafted
    assert [event.token for event in output.tokens] == [5, 6, 9]
    assert (core.stats().drafted_tokens, core.stats().accepted_tokens) == (4, 2)
    run(core)


@pytest.mark.parametrize(
    ("stopping", "reason"),
    [
        ({"eos_token_ids": (6,)}, FinishReason.EOS),
        ({"stop_token_ids": (6,)}, FinishReason.STOP),
    ],
)
def test_nothing_comes_after_an_end_among_the_drafts(
    make_request: MakeRequest, stopping: dict[str, tuple[int, ...]], reason: FinishReason
) -> None:
    core = make_core(Circle())
    core.submit(make_request("a", CIRCLE, 30, **stopping))
    tokens, steps = run(core)
    assert tokens == [8, 5, 6]
    assert [end.reason for output in steps for end in output.finished] == [reason]


def test_drafts_never_run_beyond_max_tokens(make_request: MakeRequest) -> None:
    runner = Circle()
    core = make_core(runner, most=9)
    core.submit(make_request("a", CIRCLE, 6))
    tokens, _ = run(core)
    assert len(tokens) == 6
    assert max(len(item.drafts) for step in runner.steps for item in step.items) == 4


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(repetition_penalty=1.1),
        SamplingParams(presence_penalty=0.5),
        SamplingParams(frequency_penalty=-0.5),
        SamplingParams(logprobs=0),
        SamplingParams(constraint=Constraint(kind="regex", text="a*")),
    ],
)
def test_what_depends_on_the_tokens_just_before_is_not_drafted(
    make_request: MakeRequest, sampling: SamplingParams
) -> None:
    core = make_core(Circle())
    core.submit(make_request("a", CIRCLE, 12, sampling=sampling))
    run(core)
    assert core.stats().drafted_tokens == 0


def test_before_min_tokens_nothing_is_drafted(make_request: MakeRequest) -> None:
    runner = Circle()
    core = make_core(runner)
    core.submit(make_request("a", CIRCLE, 12, min_tokens=6))
    run(core)
    drafted = [i.sequence.generated for step in runner.steps for i in step.items if i.drafts]
    assert drafted
    first = next(n for n, step in enumerate(runner.steps) if step.items[0].drafts)
    assert first == 6


def test_a_step_has_no_more_rows_than_its_bounds(make_request: MakeRequest) -> None:
    for budget, most_rows in ((64, 16), (10, 10)):
        runner = Circle(num_blocks=128)
        core = make_core(runner, most=8, token_budget=budget, max_sequences=8)
        for name in "abcd":
            core.submit(make_request(name, CIRCLE, 20))
        run(core)
        decodes = [step for step in runner.steps if all(i.length == 1 for i in step.items)]
        assert max(sum(item.rows for item in step.items) for step in decodes) == most_rows


def test_drafts_take_no_block_that_a_decode_needs(make_request: MakeRequest) -> None:
    """The pool cannot hold both ends: drafts preempt nobody sooner than plain decoding does."""
    for blocks in (7, 8, 9, 10):
        counts = []
        for most in (0, 4):
            core = make_core(Circle(num_blocks=blocks), most)
            for name in "ab":
                core.submit(make_request(name, CIRCLE, 9))
            tokens, _ = run(core)
            assert len(tokens) == 18
            counts.append(core.stats().preemptions)
        assert counts[1] <= counts[0], f"{blocks} blocks"


def test_prompts_go_on_beside_drafts(make_request: MakeRequest) -> None:
    """A step whose budget drafts would fill keeps a block's tokens for a prompt."""
    for most in (0, 4, 16):
        core = make_core(Circle(num_blocks=128), most, token_budget=16)
        for name in "abc":
            core.submit(make_request(name, CIRCLE, 150))
        for _ in range(6):
            core.step()
        core.submit(make_request("late", 12, 1))
        steps = 0
        while not any(event.id == "late" for event in core.step().tokens):
            steps += 1
        assert steps <= 3
        run(core)


def test_blocks_that_drafts_filled_are_found_again(make_request: MakeRequest) -> None:
    cached = []
    for most in (0, 4):
        core = make_core(Circle(), most)
        core.submit(make_request("a", CIRCLE, 13, cache_salt="same"))
        tokens, _ = run(core)
        core.submit(make_request("b", [*CIRCLE, *tokens, 1], 1, cache_salt="same"))
        run(core)
        cached.append(core.stats().cached_tokens)
    assert cached[0] == cached[1] > 16


def test_logits_that_are_not_finite_behind_a_right_draft_fail_the_request(
    make_request: MakeRequest,
) -> None:
    class Breaks(Circle):
        def run(self, batch: ScheduledBatch) -> StepResult:
            result = super().run(batch)
            for sampled in result.after_drafts.values():
                sampled[1:2] = [-1] * len(sampled[1:2])
            return result

    core = make_core(Breaks())
    core.submit(make_request("a", CIRCLE, 30))
    tokens, steps = run(core)
    assert tokens == [8, 5, 6]
    assert [end.reason for output in steps for end in output.finished] == [FinishReason.ERROR]


def test_it_stops_where_drafts_fail_and_comes_back(make_request: MakeRequest) -> None:
    class Contrary(ArithmeticRunner):
        """Repeats itself, but never in what comes after it."""

        def next_token(self, tokens: list[int]) -> int:
            return 5 if len(tokens) % 4 else 10 + len(tokens)

    runner = Contrary()
    core = make_core(runner)
    core.submit(make_request("a", [5, 5, 5, 9], 200))
    run(core)
    drafting = [bool(step.items[0].drafts) for step in runner.steps]
    assert any(drafting[:20])
    assert any(drafting[100:])
    assert sum(drafting) < len(drafting) / 4


def test_rows_count_drafts() -> None:
    request = Request(
        id="a",
        prompt=[1],
        sampling=SamplingParams(),
        stopping=StoppingParams(max_tokens=9),
        arrival=0.0,
    )
    item = ScheduledSequence(Sequence(request, [1]), 1, drafts=(2, 3))
    assert (item.rows, item.length, item.samples) == (3, 1, True)
