"""Generations from text to text, over an engine in a thread whose tokens are known by hand."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

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
        config = SchedulerConfig(max_sequences=max_sequences, token_budget=32)
        client = EngineClient(lambda: LocalTransport(lambda: EngineCore(chosen, config)))
        await client.start()
        generator = Generator(
            client,
            Letters(),  # type: ignore[arg-type]
            defaults or GenerationDefaults(),
            max_open,
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
    await asyncio.sleep(0)
    runner.allow(1)
    await stopping
    with pytest.raises((EngineUnavailable, GenerationFailed)):
        await exhaust(deltas)
    generation.close()


async def test_before_the_model_is_loaded_a_request_is_unavailable() -> None:
    client = EngineClient(lambda: LocalTransport(lambda: EngineCore(Gated(), SchedulerConfig())))
    generator = Generator(client, Letters(), GenerationDefaults(), 1)  # type: ignore[arg-type]
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
