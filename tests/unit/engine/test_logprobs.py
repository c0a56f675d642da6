"""Log-probabilities against torch.log_softmax, and of prompts through chunks and preemption."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.config import CacheConfig, EngineConfig, KernelConfig, SchedulerConfig
from engine.core import EngineCore
from engine.kernels.cpu import library
from engine.logprobs import LogprobsReport, prompt_logprobs, token_logprobs
from engine.scoring import Scorer
from engine.types import (
    FinishReason,
    Request,
    SamplingParams,
    ScheduledBatch,
    ScheduledSequence,
    Sequence,
    StoppingParams,
    TokenLogprobs,
)

VOCABULARY = 37


def random_logits(rows: int) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(rows)) * 5


def assert_right(found: TokenLogprobs, logits_V: Tensor, token: int, count: int) -> None:
    wanted = logits_V.double().log_softmax(0)
    assert found.token == token
    assert found.logprob == pytest.approx(float(wanted[token]), abs=1e-4)
    assert found.rank == 1 + int((logits_V > logits_V[token]).sum())
    assert [each for each, _ in found.top] == logits_V.topk(count).indices.tolist()
    for each, logprob in found.top:
        assert logprob == pytest.approx(float(wanted[each]), abs=1e-4)


def sequence(prompt: list[int], **values: int | None) -> Sequence:
    request = Request(
        id="a",
        prompt=prompt,
        sampling=SamplingParams(**values),  # type: ignore[arg-type]
        stopping=StoppingParams(max_tokens=4),
        arrival=0.0,
    )
    return Sequence(request, list(prompt))


@pytest.fixture(params=["torch", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_each_row_has_its_own_count(backend: str) -> None:
    logits, tokens, counts = random_logits(6), [3, 0, 36, 7, 7, 1], [0, 1, 2, 5, 20, 37]
    for row, found in enumerate(token_logprobs(logits, tokens, counts, backend)):
        assert_right(found, logits[row], tokens[row], counts[row])


@pytest.mark.parametrize("vocabulary", [1, 15, 257, 3001, 70_000])
@pytest.mark.parametrize("scale", [1e-3, 5.0, 1e4, 1e37])
def test_any_vocabulary_and_any_size_of_logits(backend: str, vocabulary: int, scale: float) -> None:
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(1)) * scale
    wanted = logits.double().log_softmax(1)
    tokens, count = [0, vocabulary // 2, vocabulary - 1], min(vocabulary, 5)
    for row, found in enumerate(token_logprobs(logits, tokens, [count] * 3, backend)):
        assert found.rank == 1 + int((logits[row] > logits[row, tokens[row]]).sum())
        assert found.logprob == pytest.approx(float(wanted[row, tokens[row]]), rel=1e-5, abs=1e-5)
        assert [token for token, _ in found.top] == logits[row].topk(count).indices.tolist()


@pytest.mark.parametrize("name", library.supported())
def test_all_instruction_sets_report_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 1003, generator=torch.Generator().manual_seed(2)) * 5
    wanted = token_logprobs(logits, [0, 500, 1002], [9] * 3, "cpu")
    kernels = partial(library.kernels, name)
    monkeypatch.setattr("engine.kernels.cpu.sample.kernels", kernels)
    assert token_logprobs(logits, [0, 500, 1002], [9] * 3, "cpu") == wanted


def test_tokens_without_probability_come_last_and_once(backend: str) -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]])
    (found,) = token_logprobs(logits, [2], [4], backend)
    ids = [token for token, _ in found.top]
    assert ids[:2] == [2, 0]
    assert sorted(ids) == [0, 1, 2, 3]


def test_more_alternatives_than_tokens_are_all_tokens(backend: str) -> None:
    (found,) = token_logprobs(torch.zeros(1, 3), [1], [20], backend)
    assert sorted(token for token, _ in found.top) == [0, 1, 2]
    assert found.rank == 1


@pytest.mark.parametrize("asking", [{1: 2, 3: 0, 4: 1}, {0: 2, 1: 2, 2: 2, 3: 2, 4: 1}])
def test_only_rows_that_ask_are_reported_as_they_were(backend: str, asking: dict[int, int]) -> None:
    logits = random_logits(5)
    before = logits.clone()
    sequences = [sequence([1], logprobs=asking.get(row)) for row in range(5)]
    report = LogprobsReport(logits, sequences, changing=True, backend=backend)
    logits.zero_()
    found = report.of([4, 5, 6, -1, 8])
    assert found.keys() == asking.keys() - {3}
    assert_right(found[1], before[1], 5, 2)
    assert_right(found[4], before[4], 8, 1)
    one = [sequence([1], logprobs=2)]
    assert LogprobsReport(logits, one, changing=False, backend=backend).of([-1]) == {}


@pytest.mark.parametrize("chunks", [[150], [1, 70, 79], [64, 64, 22], [149, 1]])
def test_a_prompt_in_chunks_is_reported_once_and_few_rows_at_a_time(chunks: list[int]) -> None:
    prompt = [n * 7 % VOCABULARY for n in range(150)]
    logits, sizes = random_logits(150), []

    def head(hidden_TK: Tensor) -> Tensor:
        sizes.append(len(hidden_TK))
        return logits[hidden_TK[:, 0].long()]

    one, found = sequence(prompt, prompt_logprobs=2), []
    for attempt in (chunks[:-1], chunks):  # the first ones twice, as after a preemption
        one.computed = 0
        for length in attempt:
            other = ScheduledSequence(sequence([1, 2, 3]), 3)
            batch = ScheduledBatch([other, ScheduledSequence(one, length)])
            hidden = torch.arange(one.computed - 3.0, one.computed + length)[:, None]
            for part in prompt_logprobs(batch, hidden, head, "torch"):
                found += part.tokens
            one.computed += length
    assert [each.token for each in found] == prompt[1:]
    for position, each in enumerate(found):
        assert_right(each, logits[position], prompt[position + 1], 2)
    assert max(sizes) <= 64


def test_one_token_is_a_prompt_without_log_probabilities() -> None:
    batch = ScheduledBatch([ScheduledSequence(sequence([3], prompt_logprobs=1), 1)])
    assert prompt_logprobs(batch, torch.zeros(1, 1), random_logits, "torch") == []


def test_other_choices_do_not_report_the_prompt_again() -> None:
    one = sequence([3, 4, 5], prompt_logprobs=1)
    one.choice = 1
    batch = ScheduledBatch([ScheduledSequence(one, 3)])
    assert prompt_logprobs(batch, torch.zeros(3, 1), random_logits, "torch") == []


MakeConfig = Callable[..., EngineConfig]


@pytest.fixture
def make_config(model_dir: Path) -> MakeConfig:
    def make(*, blocks: int = 64, token_budget: int = 64) -> EngineConfig:
        return EngineConfig(
            model_dir=model_dir,
            cache=CacheConfig(dtype="fp32", block_size=4, blocks=blocks),
            scheduler=SchedulerConfig(max_sequences=4, token_budget=token_budget),
            kernels=KernelConfig(threads=1),
        )

    return make


@pytest.mark.parametrize(("blocks", "token_budget"), [(64, 64), (64, 5), (20, 7)])
def test_the_models_own_are_those_of_its_logits(
    make_config: MakeConfig, blocks: int, token_budget: int
) -> None:
    """Sequences of one another preempt each other where there are few blocks."""
    core = EngineCore.from_config(make_config(blocks=blocks, token_budget=token_budget))
    prompts = {f"{n}": [(n * 31 + i * 17) % 4000 for i in range(30 + n)] for n in range(3)}
    for name, prompt in prompts.items():
        core.submit(
            Request(
                id=name,
                prompt=prompt,
                sampling=SamplingParams(
                    logprobs=3,
                    prompt_logprobs=1,
                    temperature=2.0,
                    seed=3,
                    repetition_penalty=1.5,
                ),
                stopping=StoppingParams(max_tokens=20),
                arrival=0.0,
            )
        )
    of_prompt: dict[str, list[TokenLogprobs]] = {name: [] for name in prompts}
    sampled: dict[str, list[TokenLogprobs]] = {name: [] for name in prompts}
    preemptions = 0
    while core.has_work:
        output = core.step()
        for prompt_part in output.prompts:
            assert not sampled[prompt_part.id]
            of_prompt[prompt_part.id] += prompt_part.tokens
        for event in output.tokens:
            assert event.logprobs is not None
            assert event.logprobs.token == event.token
            sampled[event.id].append(event.logprobs)
        for finished in output.finished:
            assert finished.reason is FinishReason.LENGTH
            preemptions += finished.preemptions
    assert (preemptions > 0) == (blocks == 20)
    scorer = Scorer(make_config())
    for name, prompt in prompts.items():
        tokens = prompt + [each.token for each in sampled[name]]
        logits = scorer.logits(tokens)
        assert [each.token for each in of_prompt[name]] == prompt[1:]
        for position, each in enumerate(of_prompt[name] + sampled[name]):
            wanted = logits[position].double().log_softmax(0)
            assert each.logprob == pytest.approx(float(wanted[each.token]), abs=2e-3)
            assert each.top[0][1] == pytest.approx(float(wanted.max()), abs=2e-3)
