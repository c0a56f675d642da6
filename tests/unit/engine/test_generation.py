"""Generations from text to text, over an engine in a thread whose tokens are known by hand."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from engine.client.admission import Admission
from engine.client.defaults import GenerationDefaults
from engine.client.engine_client import EngineClient, EngineState
from engine.client.generation import Delta, End, Generation, Generator
from engine.client.requests import Chat, GenerationRequest
from engine.client.stream import Coalescing
from engine.config import SchedulerConfig
from engine.core import EngineCore
from engine.errors import (
    DeadlineExceeded,
    EngineUnavailable,
    GenerationFailed,
    InvalidRequest,
    Overloaded,
)
from engine.local import LocalTransport
from engine.testing import ArithmeticRunner
from engine.types import FinishReason, ScheduledBatch, StepResult

PROMPT = "Hello"
MakeGenerator = Callable[..., Awaitable[Generator]]


class Letters:
    """A tokenizer of single characters: id 1 is a space, 96 is the last of ASCII."""

    chat_stop = "\x7f"
    longest_token = 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if any(not " " <= letter <= "\x7f" for letter in text):
            raise InvalidRequest("input", "ASCII only")
        return [ord(letter) - 31 for letter in text]

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(token + 31) for token in ids)

    def render(self, messages: list[dict[str, str]], add: bool, extra: dict[str, Any]) -> str:
        return "".join(message["content"] for message in messages)


class Gated(ArithmeticRunner):
    """Runs as many steps as ``allow`` says; ends its thread where ``dies`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Semaphore(0)
        self.dies = False

    def allow(self, steps: int) -> None:
        self.gate.release(steps)

    def run(self, batch: ScheduledBatch) -> StepResult:
        self.gate.acquire()
        if self.dies:
            raise SystemExit
        return super().run(batch)


@pytest.fixture
async def make_generator() -> AsyncIterator[MakeGenerator]:
    made: list[tuple[Generator, ArithmeticRunner]] = []

    async def make(
        runner: ArithmeticRunner | None = None,
        *,
        defaults: GenerationDefaults | None = None,
        max_open: int = 8,
        max_sequences: int = 4,
    ) -> Generator:
        chosen = runner or ArithmeticRunner()
        config = SchedulerConfig(max_sequences=max_sequences, token_budget=32, speculative_tokens=0)
        client = EngineClient(lambda: LocalTransport(lambda: EngineCore(chosen, config)))
        await client.start()
        generator = Generator(
            client,
            Letters(),  # type: ignore[arg-type]
            defaults or GenerationDefaults(),
            Admission(max_open, max_queued_tokens=1000),
        )
        made.append((generator, chosen))
        return generator

    yield make
    for generator, runner in made:
        if isinstance(runner, Gated):
            runner.allow(1000)
        await generator.engine.stop()


def ask(prompt: str | list[int] | Chat = PROMPT, **values: Any) -> GenerationRequest:
    return GenerationRequest(**{"id": "a", "prompt": prompt, "max_tokens": 20, **values})


def expected(count: int, prompt: str = PROMPT) -> str:
    return Letters().decode(ArithmeticRunner().expected(Letters().encode(prompt), count))


async def collect(generation: Generation) -> tuple[str, list[int], End]:
    """Text, tokens and end; the end must come once and last."""
    deltas: list[Delta] = []
    async with asyncio.timeout(10):
        async for delta in generation:
            assert not deltas or deltas[-1].end is None
            deltas.append(delta)
    generation.close()
    end = deltas[-1].end
    assert end is not None
    tokens = [token for delta in deltas for token in delta.token_ids]
    return "".join(delta.text for delta in deltas), tokens, end


async def run(generator: Generator, request: GenerationRequest) -> tuple[str, list[int], End]:
    return await collect(await generator.start(request))


async def first(generation: Generation) -> tuple[AsyncIterator[Delta], Delta]:
    """The iterator and what it gives first."""
    deltas = aiter(generation)
    async with asyncio.timeout(10):
        return deltas, await anext(deltas)


async def exhaust(deltas: AsyncIterator[Delta]) -> None:
    async with asyncio.timeout(10):
        async for _ in deltas:
            pass


async def idle(generator: Generator) -> None:
    """Waits until the engine has nothing to do, and all its blocks."""
    async with asyncio.timeout(5):
        while True:
            stats = await generator.engine.stats()
            if (stats.queued, stats.running, stats.blocks_used) == (0, 0, 0):
                return
            await asyncio.sleep(0.005)


async def test_text_goes_in_and_text_comes_out(make_generator: MakeGenerator) -> None:
    generator = await make_generator()
    generation = await generator.start(ask())
    assert generation.prompt_tokens == len(PROMPT)
    text, tokens, end = await collect(generation)
    assert text == expected(20)
    assert tokens == Letters().encode(text)
    assert (end.reason, end.stop, end.stop_token_id) == (FinishReason.LENGTH, None, None)
    assert end.completion_tokens == 20
    assert end.scheduled is not None
    assert end.first_token is not None
    assert end.arrival <= end.tokenized <= end.scheduled <= end.first_token <= end.finished


async def test_token_ids_go_in_as_they_are(make_generator: MakeGenerator) -> None:
    generator = await make_generator()
    _, tokens, _ = await run(generator, ask([3, 1, 2]))
    assert tokens == ArithmeticRunner().expected([3, 1, 2], 20)


async def test_many_generations_do_not_mix(make_generator: MakeGenerator) -> None:
    generator = await make_generator(max_open=30, max_sequences=3)
    prompts = ["x" * (1 + n % 7) + str(n) for n in range(25)]
    results = await asyncio.gather(
        *(run(generator, ask(p, id=str(n), max_tokens=9)) for n, p in enumerate(prompts))
    )
    assert [text for text, _, _ in results] == [expected(9, prompt) for prompt in prompts]
    assert generator.open_requests == 0


async def test_without_max_tokens_the_context_is_filled(make_generator: MakeGenerator) -> None:
    generator = await make_generator(ArithmeticRunner(num_blocks=10))
    text, _, end = await run(generator, ask(max_tokens=None))
    assert end.reason is FinishReason.LENGTH
    assert len(text) == 40 - len(PROMPT)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("length", [1, 2, 5])
async def test_a_stop_string_ends_the_text_and_the_engines_work(
    make_generator: MakeGenerator, length: int, include: bool
) -> None:
    generator = await make_generator()
    stop = expected(40)[7 : 7 + length]
    at = expected(40).index(stop)
    text, tokens, end = await run(
        generator, ask(max_tokens=100, stop=("\x7f\x7f", stop), include_stop=include)
    )
    assert text == expected(40)[: at + length if include else at]
    assert (end.reason, end.stop) == (FinishReason.STOP, stop)
    assert len(tokens) == end.completion_tokens == at + length
    await idle(generator)


async def test_at_the_end_by_a_stop_string_the_blocks_are_free(
    make_generator: MakeGenerator,
) -> None:
    generator = await make_generator()
    generation = await generator.start(ask(max_tokens=200, stop=(expected(9)[8],)))
    async with asyncio.timeout(10):
        async for delta in generation:
            if delta.end is not None:
                stats = await generator.engine.stats()
                assert (stats.running, stats.blocks_used) == (0, 0)
                assert delta.end.finished >= delta.end.arrival
    generation.close()


async def test_the_start_of_a_stop_string_is_given_out_at_the_end(
    make_generator: MakeGenerator,
) -> None:
    generator = await make_generator()
    whole = expected(6)
    text, _, end = await run(generator, ask(max_tokens=6, stop=(whole[4:] + "\x7f",)))
    assert text == whole
    assert end.reason is FinishReason.LENGTH


async def test_text_that_may_be_a_stop_is_held_back(make_generator: MakeGenerator) -> None:
    runner = Gated()
    generator = await make_generator(runner)
    whole = expected(10)
    coalescing = Coalescing(max_tokens=1)
    generation = await generator.start(ask(stop=(whole[0] + "\x7f",), coalescing=coalescing))
    runner.allow(1)
    deltas, delta = await first(generation)
    assert (delta.text, len(delta.token_ids)) == ("", 1)
    runner.allow(1)
    assert (await anext(deltas)).text == whole[:2]
    generation.close()
    runner.allow(1)


@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_token_ends_the_text_and_is_shown_where_asked(
    make_generator: MakeGenerator, include: bool
) -> None:
    generator = await make_generator()
    tokens = Letters().encode(expected(20))
    at = tokens.index(tokens[6])
    text, found, end = await run(generator, ask(stop_token_ids=(tokens[6],), include_stop=include))
    assert text == expected(20)[: at + 1 if include else at]
    assert found == tokens[: at + 1]
    assert (end.reason, end.stop_token_id) == (FinishReason.STOP, tokens[6])


async def test_the_models_end_token_ends_unless_it_is_ignored(
    make_generator: MakeGenerator,
) -> None:
    eos = Letters().encode(expected(20))[4]
    generator = await make_generator(defaults=GenerationDefaults(eos_token_ids=(eos,)))
    _, tokens, end = await run(generator, ask())
    assert (end.reason, tokens[-1], end.stop_token_id) == (FinishReason.EOS, eos, eos)
    _, tokens, end = await run(generator, ask(ignore_eos=True))
    assert (end.reason, len(tokens)) == (FinishReason.LENGTH, 20)


@pytest.mark.parametrize("include", [False, True])
async def test_the_models_end_token_is_shown_where_stops_are(
    make_generator: MakeGenerator, include: bool
) -> None:
    tokens = Letters().encode(expected(20))
    at = tokens.index(tokens[4])
    generator = await make_generator(defaults=GenerationDefaults(eos_token_ids=(tokens[4],)))
    text, _, _ = await run(generator, ask(include_stop=include))
    assert text == expected(20)[: at + 1 if include else at]


async def test_text_that_cannot_fit_is_refused_before_it_is_tokenised(
    make_generator: MakeGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Letters, "encode")
    monkeypatch.setattr(Letters, "longest_token", 3)
    generator = await make_generator(ArithmeticRunner(num_blocks=10))
    chat = Chat(messages=[{"role": "user", "content": "x" * 61}] * 2)
    for prompt in ("x" * 121, chat):
        with pytest.raises(InvalidRequest) as caught:
            await generator.start(ask(prompt))
        assert caught.value.field == "input"
    assert generator.open_requests == 0


@pytest.mark.parametrize("named", [False, True], ids=["template", "generation_config"])
async def test_a_chat_stops_where_the_next_turn_begins(
    make_generator: MakeGenerator, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = expected(20)[5:7]
    monkeypatch.setattr(Letters, "chat_stop", "never" if named else stop)
    defaults = GenerationDefaults(chat_stop=(stop,) if named else ())
    generator = await make_generator(defaults=defaults)
    chat = Chat(messages=[{"role": "user", "content": PROMPT}])
    assert (await run(generator, ask(chat)))[2].stop == stop
    assert (await run(generator, ask(chat, stop=())))[2].reason is FinishReason.LENGTH
    assert (await run(generator, ask(PROMPT)))[2].reason is FinishReason.LENGTH


@pytest.mark.parametrize("size", [1, 3, 50])
async def test_deltas_have_no_more_tokens_than_asked_for(
    make_generator: MakeGenerator, size: int
) -> None:
    generator = await make_generator()
    generation = await generator.start(ask(coalescing=Coalescing(max_tokens=size)))
    async with asyncio.timeout(10):
        sizes = [len(delta.token_ids) async for delta in generation]
    generation.close()
    assert max(sizes) <= size
    assert sum(sizes) == 20


async def test_too_many_open_requests_are_refused(make_generator: MakeGenerator) -> None:
    runner = Gated()
    generator = await make_generator(runner, max_open=2)
    opened = [await generator.start(ask(id=name)) for name in "ab"]
    with pytest.raises(Overloaded) as caught:
        await generator.start(ask(id="c"))
    assert caught.value.retry_after_s > 0
    opened[0].close()
    opened[0].close()
    assert generator.open_requests == 1
    again = await generator.start(ask(id="c"))
    with pytest.raises(Overloaded):
        await generator.start(ask(id="d"))
    for generation in (opened[1], again):
        generation.close()
    assert generator.open_requests == 0


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0},
        {"prompt": ""},
        {"prompt": []},
        {"prompt": "é"},
        {"prompt": "x" * 300},
        {"prompt": "x" * 250, "max_tokens": 10},
        {"prompt": Chat(messages=[])},
    ],
)
async def test_a_refused_request_takes_no_place(
    make_generator: MakeGenerator, values: dict[str, Any]
) -> None:
    generator = await make_generator(max_open=1)
    with pytest.raises(InvalidRequest):
        await generator.start(ask(**values))
    assert generator.open_requests == 0
    assert (await run(generator, ask()))[0] == expected(20)


async def test_a_caller_who_gives_up_while_it_is_tokenised_takes_no_place(
    make_generator: MakeGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Letters.encode

    def slow(self: Letters, text: str, *, add_special_tokens: bool = True) -> list[int]:
        time.sleep(0.05)
        return encode(self, text)

    monkeypatch.setattr(Letters, "encode", slow)
    generator = await make_generator()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(generator.start(ask()), 0.01)
    assert generator.open_requests == 0
    await idle(generator)


async def test_close_frees_the_blocks_of_a_running_request(make_generator: MakeGenerator) -> None:
    runner = Gated()
    generator = await make_generator(runner)
    generation = await generator.start(ask(max_tokens=200))
    runner.allow(2)
    await first(generation)
    generation.close()
    runner.allow(1)
    await idle(generator)
    assert len(runner.steps) <= 3


async def test_close_before_the_first_token_frees_the_place_in_the_queue(
    make_generator: MakeGenerator,
) -> None:
    runner = Gated()
    generator = await make_generator(runner, max_sequences=1)
    opened = [await generator.start(ask(id=name)) for name in "ab"]
    opened[1].close()
    runner.allow(40)
    assert (await collect(opened[0]))[0] == expected(20)
    await idle(generator)
    ran = {item.sequence.id for batch in runner.steps for item in batch.items}
    assert ran == {"a"}


async def test_a_deadline_is_an_error_of_its_own(make_generator: MakeGenerator) -> None:
    generator = await make_generator()
    late = await generator.start(ask(id="late", deadline=time.monotonic() - 1))
    with pytest.raises(DeadlineExceeded):
        await collect(late)
    late.close()
    runner = Gated()
    generator = await make_generator(runner)
    generation = await generator.start(ask(deadline=time.monotonic() + 0.4))
    runner.allow(1)
    deltas, _ = await first(generation)
    await asyncio.sleep(0.4)
    runner.allow(5)
    with pytest.raises(DeadlineExceeded):
        await exhaust(deltas)
    generation.close()
    await idle(generator)


async def test_a_time_limit_ends_with_what_there_is(make_generator: MakeGenerator) -> None:
    runner = Gated()
    generator = await make_generator(runner)
    generation = await generator.start(ask(max_duration=0.05))
    runner.allow(2)
    waiting = asyncio.ensure_future(collect(generation))
    await asyncio.sleep(0.06)
    runner.allow(5)
    text, _, end = await waiting
    assert end.reason is FinishReason.TIME_LIMIT
    assert text == expected(20)[: end.completion_tokens]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_an_engine_that_dies_before_the_first_token_is_unavailable(
    make_generator: MakeGenerator,
) -> None:
    runner = Gated()
    generator = await make_generator(runner)
    generation = await generator.start(ask())
    runner.dies = True
    runner.allow(1)
    with pytest.raises(EngineUnavailable):
        await collect(generation)
    generation.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_an_engine_that_dies_later_fails_the_generation_and_serves_again(
    make_generator: MakeGenerator,
) -> None:
    runner = Gated()
    generator = await make_generator(runner)
    generation = await generator.start(ask())
    runner.allow(2)
    deltas, _ = await first(generation)
    runner.dies = True
    runner.allow(1)
    with pytest.raises(GenerationFailed):
        await exhaust(deltas)
    generation.close()
    runner.dies = False
    runner.allow(1000)
    async with asyncio.timeout(5):
        while generator.engine.state is not EngineState.READY:
            await asyncio.sleep(0.01)
    assert (await run(generator, ask()))[0] == expected(20)


async def test_a_failed_step_fails_the_generation_only(make_generator: MakeGenerator) -> None:
    class Once(ArithmeticRunner):
        failed = False

        def run(self, batch: ScheduledBatch) -> StepResult:
            if not self.failed:
                self.failed = True
                raise RuntimeError
            return super().run(batch)

    generator = await make_generator(Once())
    generation = await generator.start(ask())
    with pytest.raises(GenerationFailed):
        await collect(generation)
    generation.close()
    assert generator.engine.state is EngineState.READY
    assert (await run(generator, ask()))[0] == expected(20)


async def test_a_drain_before_the_first_token_may_be_tried_again(
    make_generator: MakeGenerator,
) -> None:
    runner = Gated()
    generator = await make_generator(runner, max_sequences=1)
    opened = [await generator.start(ask(id=name)) for name in "ab"]
    generator.engine.cancel_all()
    runner.allow(5)
    with pytest.raises(EngineUnavailable):
        await collect(opened[1])
    for generation in opened:
        generation.close()


async def test_a_drain_after_the_first_token_is_no_regular_end(
    make_generator: MakeGenerator,
) -> None:
    runner = Gated()
    generator = await make_generator(runner)
    generation = await generator.start(ask())
    runner.allow(1)
    deltas, _ = await first(generation)
    generator.engine.cancel_all()
    runner.allow(5)
    with pytest.raises((EngineUnavailable, GenerationFailed)):
        await exhaust(deltas)
    generation.close()


async def test_a_live_id_is_refused_and_takes_no_place(make_generator: MakeGenerator) -> None:
    runner = Gated()
    generator = await make_generator(runner)
    generation = await generator.start(ask(id="same"))
    with pytest.raises(InvalidRequest):
        await generator.start(ask(id="same"))
    assert generator.open_requests == 1
    runner.allow(100)
    assert (await collect(generation))[0] == expected(20)


async def test_stop_ends_open_generations(make_generator: MakeGenerator) -> None:
    runner = Gated()
    generator = await make_generator(runner)
    generation = await generator.start(ask(max_tokens=200))
    runner.allow(1)
    deltas, _ = await first(generation)
    stopping = asyncio.ensure_future(generator.engine.stop())
    while not stopping.done():  # it is heard between two steps
        runner.allow(1)
        await asyncio.sleep(0.002)
    await stopping
    with pytest.raises((EngineUnavailable, GenerationFailed)):
        await exhaust(deltas)
    generation.close()


async def test_before_the_model_is_loaded_a_request_is_unavailable() -> None:
    client = EngineClient(lambda: LocalTransport(lambda: EngineCore(Gated(), SchedulerConfig())))
    generator = Generator(
        client,
        Letters(),  # type: ignore[arg-type]
        GenerationDefaults(),
        Admission(1, 1),
    )
    with pytest.raises(EngineUnavailable):
        await generator.start(ask())
    assert generator.open_requests == 0


async def test_tokenize_and_detokenize_are_each_others_inverse(
    make_generator: MakeGenerator,
) -> None:
    generator = await make_generator()
    ids, text = await generator.tokenize(Chat(messages=[{"role": "user", "content": "Hi you"}]))
    assert text == "Hi you"
    assert await generator.detokenize(ids) == "Hi you"
    with pytest.raises(InvalidRequest):
        await generator.detokenize([97])


class Diverging(ArithmeticRunner):
    """Each choice goes its own way, as if it had been sampled."""

    def expected_of(self, choice: int, count: int, prompt: str = PROMPT) -> list[int]:
        tokens = Letters().encode(prompt)
        for _ in range(count):
            tokens.append(self._next(tokens, choice))
        return tokens[-count:]

    def run(self, batch: ScheduledBatch) -> StepResult:
        result = super().run(batch)
        pairs = zip(batch.items, result.tokens, strict=True)
        return StepResult(
            [self._next(i.sequence.tokens, i.sequence.choice) if i.samples else 0 for i, _ in pairs]
        )

    def _next(self, tokens: list[int], choice: int) -> int:
        return self.next_token([*tokens, 5 * choice])


async def collect_all(generation: Generation) -> list[tuple[str, list[int], End]]:
    """Text, tokens and end of each choice; each end must come once and last."""
    texts, tokens = [""] * generation.choices, [list[int]() for _ in range(generation.choices)]
    ends: dict[int, End] = {}
    async with asyncio.timeout(10):
        async for delta in generation:
            assert delta.choice not in ends
            texts[delta.choice] += delta.text
            tokens[delta.choice] += delta.token_ids
            if delta.end is not None:
                ends[delta.choice] = delta.end
    generation.close()
    return [(texts[n], tokens[n], ends[n]) for n in range(generation.choices)]


@pytest.mark.parametrize("size", [1, 3, 50])
@pytest.mark.parametrize("max_sequences", [2, 8])
async def test_each_choice_gets_its_own_tokens_in_order_and_one_end(
    make_generator: MakeGenerator, max_sequences: int, size: int
) -> None:
    runner = Diverging()
    generator = await make_generator(runner, max_sequences=max_sequences)
    generation = await generator.start(ask(n=4, coalescing=Coalescing(max_tokens=size)))
    assert generation.choices == 4
    for choice, (text, tokens, end) in enumerate(await collect_all(generation)):
        assert tokens == runner.expected_of(choice, 20)
        assert text == Letters().decode(tokens)
        assert (end.reason, end.completion_tokens) == (FinishReason.LENGTH, 20)
    await idle(generator)


async def test_choices_of_many_requests_do_not_mix(make_generator: MakeGenerator) -> None:
    runner = Diverging()
    generator = await make_generator(runner, max_open=30, max_sequences=5)
    prompts = [f"{PROMPT} {n}" for n in range(10)]
    opened = [await generator.start(ask(p, id=p, max_tokens=7, n=3)) for p in prompts]
    results = await asyncio.gather(*(collect_all(generation) for generation in opened))
    for prompt, found in zip(prompts, results, strict=True):
        wanted = [runner.expected_of(choice, 7, prompt) for choice in range(3)]
        assert [tokens for _, tokens, _ in found] == wanted
    assert generator.open_requests == 0


async def test_a_stop_string_ends_its_choice_alone(make_generator: MakeGenerator) -> None:
    runner = Diverging()
    wholes = [Letters().decode(runner.expected_of(choice, 60)) for choice in range(3)]
    stop = next(s for n in range(5, 50) if (s := wholes[1][n : n + 3]) not in wholes[0] + wholes[2])
    generator = await make_generator(runner)
    generation = await generator.start(ask(max_tokens=60, n=3, stop=(stop,)))
    found = await collect_all(generation)
    at = wholes[1].index(stop)
    assert [text for text, _, _ in found] == [wholes[0], wholes[1][:at], wholes[2]]
    assert [end.reason for _, _, end in found] == [
        FinishReason.LENGTH,
        FinishReason.STOP,
        FinishReason.LENGTH,
    ]
    assert [end.stop for _, _, end in found] == [None, stop, None]
    assert [end.completion_tokens for _, _, end in found] == [60, at + 3, 60]
    await idle(generator)


class GatedDiverging(Gated, Diverging):
    """Both."""


async def test_a_stop_string_ends_the_engines_work_for_its_choice(
    make_generator: MakeGenerator,
) -> None:
    runner = GatedDiverging()
    wholes = [Letters().decode(runner.expected_of(choice, 40)) for choice in range(2)]
    stop = next(wholes[1][n : n + 3] for n in range(5, 30) if wholes[1][n : n + 3] not in wholes[0])
    at = wholes[1].index(stop) + len(stop)
    generator = await make_generator(runner)
    generation = await generator.start(ask(max_tokens=200, n=2, stop=(stop,)))
    runner.allow(at + 1)  # a choice begins a step later than the first one
    counts = [0, 0]
    async with asyncio.timeout(10):
        deltas = aiter(generation)
        while counts[1] < at:
            delta = await anext(deltas)
            counts[delta.choice] += len(delta.tokens)
        runner.allow(20)
        while delta.end is None:
            delta = await anext(deltas)
    assert (delta.choice, delta.end.stop) == (1, stop)
    ran = [item.sequence.choice for batch in runner.steps for item in batch.items]
    assert ran.count(1) <= at + 1
    generation.close()
    runner.allow(1)
    await idle(generator)


async def test_close_ends_all_choices(make_generator: MakeGenerator) -> None:
    runner = Gated()
    generator = await make_generator(runner)
    generation = await generator.start(ask(max_tokens=200, n=4))
    runner.allow(3)
    await first(generation)
    generation.close()
    runner.allow(1)
    await idle(generator)
    assert len(runner.steps) <= 4


async def test_choices_take_one_place(make_generator: MakeGenerator) -> None:
    generator = await make_generator(max_open=1)
    generation = await generator.start(ask(n=8))
    assert generator.open_requests == 1
    assert len(await collect_all(generation)) == 8
    assert generator.open_requests == 0


async def test_a_choice_that_fails_fails_the_generation(make_generator: MakeGenerator) -> None:
    class Broken(ArithmeticRunner):
        def run(self, batch: ScheduledBatch) -> StepResult:
            tokens = super().run(batch).tokens
            pairs = zip(batch.items, tokens, strict=True)
            return StepResult([-1 if i.sequence.choice == 2 else token for i, token in pairs])

    generator = await make_generator(Broken())
    generation = await generator.start(ask(n=3))
    with pytest.raises(GenerationFailed):
        await collect_all(generation)
    generation.close()
    await idle(generator)


async def test_what_waited_too_long_is_overloaded(make_generator: MakeGenerator) -> None:
    runner = Gated()
    generator = await make_generator(runner, max_sequences=1)
    opened = await generator.start(ask(id="busy", max_tokens=100))
    runner.allow(1)
    await first(opened)
    waiting = await generator.start(ask(id="late", queue_timeout=0.02, n=2))
    await asyncio.sleep(0.03)
    runner.allow(3)
    with pytest.raises(Overloaded, match="queue") as caught:
        await collect_all(waiting)
    assert caught.value.retry_after_s > 0
    for generation in (opened, waiting):
        generation.close()
    runner.allow(3)
    await idle(generator)


async def test_a_hopeless_deadline_is_overloaded_and_tells_when_to_try_again(
    make_generator: MakeGenerator,
) -> None:
    class Slow(ArithmeticRunner):
        def run(self, batch: ScheduledBatch) -> StepResult:
            time.sleep(0.01)
            return super().run(batch)

    generator = await make_generator(Slow())
    busy = await generator.start(ask(id="busy", max_tokens=200))
    deltas, _ = await first(busy)
    for _ in range(3):
        await anext(deltas)
    hopeless = await generator.start(
        ask(max_tokens=200, deadline=time.monotonic() + 1.0, ignore_eos=True)
    )
    with pytest.raises(Overloaded) as caught:
        await collect(hopeless)
    assert caught.value.retry_after_s >= 1.9, "200 steps of 10 ms"
    for generation in (busy, hopeless):
        generation.close()


async def test_the_end_tells_how_much_of_the_prompt_was_cached(
    make_generator: MakeGenerator,
) -> None:
    generator = await make_generator()
    prompt = "x" * 13

    async def cached(**values: Any) -> tuple[int, int]:
        generation = await generator.start(ask(prompt, **values))
        deltas = [delta async for delta in generation]
        generation.close()
        end = deltas[-1].end
        assert end is not None
        return deltas[0].tokens[0].cached, end.cached_tokens

    assert await cached() == (0, 0)
    assert await cached() == (12, 12)
    assert await cached(cache_salt="mine") == (0, 0)
    assert await cached(cache_salt="mine") == (12, 12)
    assert await cached(bypass_cache=True) == (0, 0)
    assert await cached(bypass_cache=True, id="b") == (0, 0)
    assert await cached(id="c") == (12, 12)


async def test_what_the_caller_asks_of_the_scheduler_reaches_it(
    make_generator: MakeGenerator,
) -> None:
    runner = ArithmeticRunner()
    generator = await make_generator(runner)
    before = time.monotonic()
    await collect_all(
        await generator.start(
            ask(n=2, priority=-7, queue_timeout=50.0, cache_salt="s", deadline=before + 500.0)
        )
    )
    request = runner.steps[0].items[0].sequence.request
    assert (request.choices, request.priority, request.cache_salt) == (2, -7, "s")
    assert request.stopping.deadline == before + 500.0
    assert request.queue_deadline == request.arrival + 50.0
    assert before <= request.arrival <= time.monotonic()


async def test_a_higher_priority_overtakes(make_generator: MakeGenerator) -> None:
    runner = Gated()
    generator = await make_generator(runner, max_sequences=1)
    opened = [
        await generator.start(ask(id=name, priority=priority, max_tokens=3))
        for name, priority in (("busy", 5), ("low", 0), ("high", 1))
    ]
    runner.allow(100)
    ends = [(await collect(generation))[2] for generation in opened]
    busy, low, high = (end.scheduled for end in ends)
    assert busy is not None
    assert low is not None
    assert high is not None
    assert busy < high < low
