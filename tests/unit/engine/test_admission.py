"""What is let in: bounds on open requests and on prompt tokens that wait for a first token."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from engine.client.admission import Admission, estimate_tokens
from engine.client.defaults import GenerationDefaults
from engine.client.engine_client import EngineClient
from engine.client.generation import Generation, Generator
from engine.client.requests import Chat, GenerationRequest
from engine.config import SchedulerConfig
from engine.core import EngineCore
from engine.errors import EngineError, EngineUnavailable, InvalidRequest, Overloaded
from engine.messages import Events, FromEngine, Ready, Submit, ToEngine
from engine.testing import ArithmeticRunner
from engine.types import Finished, FinishReason, StepOutput, TokenEvent

READY = Ready(EngineCore(ArithmeticRunner(), SchedulerConfig()).report())
CONTEXT = READY.report.max_sequence_tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("", 0), ("a", 1), ("abc", 1), ("abcd", 2), ("語" * 5, 5), ("é" * 3, 2), ("\ud800", 1)],
)
def test_the_estimate_is_a_third_of_the_bytes_rounded_up(text: str, tokens: int) -> None:
    assert estimate_tokens(text) == tokens


def test_places_are_given_back_once() -> None:
    admission = Admission(max_requests=2, max_queued_tokens=10)
    a, b = admission.enter(), admission.enter()
    with pytest.raises(Overloaded, match="2 requests") as caught:
        admission.enter()
    assert caught.value.retry_after_s > 0
    for _ in range(2):
        a.leave()
        assert admission.open_requests == 1
    admission.enter()
    with pytest.raises(Overloaded):
        admission.enter()
    b.leave()
    assert admission.open_requests == 1


def test_queued_tokens_are_bounded_and_a_refusal_changes_nothing() -> None:
    admission = Admission(max_requests=9, max_queued_tokens=10)
    a, b = admission.enter(), admission.enter()
    a.reserve(4)
    b.reserve(6)
    with pytest.raises(Overloaded, match="4 prompt tokens") as caught:
        b.reserve(7)
    assert caught.value.retry_after_s > 0
    assert admission.queued_tokens == 10
    a.start()
    b.reserve(10)
    assert (admission.queued_tokens, admission.open_requests) == (10, 2)
    b.leave()
    a.leave()
    assert (admission.queued_tokens, admission.open_requests) == (0, 0)


def test_a_request_alone_is_never_refused_and_neither_is_a_smaller_one() -> None:
    admission = Admission(max_requests=9, max_queued_tokens=10)
    alone, other = admission.enter(), admission.enter()
    alone.reserve(50)
    alone.reserve(99)
    with pytest.raises(Overloaded):
        other.reserve(1)
    alone.reserve(9)
    other.reserve(1)
    alone.start()
    other.reserve(1000)
    assert admission.queued_tokens == 1000


class Paper:
    """A transport whose engine says what the test says, by ``message`` and ``exit``."""

    def __init__(self) -> None:
        self.sent: list[ToEngine] = []
        self.message: Callable[[FromEngine], None] = lambda message: None
        self.exit: Callable[[str], None] = lambda how: None

    async def start(
        self, on_message: Callable[[FromEngine], None], on_exit: Callable[[str], None]
    ) -> None:
        self.message, self.exit = on_message, on_exit
        on_message(READY)

    def send(self, message: ToEngine) -> None:
        self.sent.append(message)

    async def stop(self) -> None:
        pass

    def submitted(self) -> list[str]:
        return [each.request.id for each in self.sent if isinstance(each, Submit)]

    def token(self, request_id: str, choice: int = 0) -> None:
        self.message(Events(StepOutput(tokens=[TokenEvent(id=request_id, token=1, choice=choice)])))

    def end(self, request_id: str, reason: FinishReason) -> None:
        finished = Finished(
            id=request_id, reason=reason, scheduled_at=None, first_token_at=None, finished_at=1.0
        )
        self.message(Events(StepOutput(finished=[finished])))


class Crosses:
    """A tokenizer whose only tokens are the x in a text. It works while ``gate`` is set."""

    chat_stop = ""
    longest_token = 1000

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        assert self.gate.wait(10)
        return [1] * text.count("x")

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return "x" * len(ids)

    def render(self, messages: list[dict[str, str]], add: bool, extra: dict[str, Any]) -> str:
        if extra:
            raise InvalidRequest("chat", "this template takes nothing")
        return "x" * 30 + "".join(message["content"] for message in messages)


class House:
    """A generator with a bound of ``tokens`` and of five requests, and what is behind it."""

    def __init__(self, tokens: int = 10) -> None:
        self.transport = Paper()
        self.tokenizer = Crosses()
        self.client = EngineClient(lambda: self.transport)
        self.admission = Admission(5, tokens)
        self.generator = Generator(
            self.client,
            self.tokenizer,  # type: ignore[arg-type]
            GenerationDefaults(),
            self.admission,
        )

    @property
    def queued(self) -> int:
        return self.admission.queued_tokens

    async def start(
        self, request_id: str, prompt: str | list[int] | Chat, **values: Any
    ) -> Generation:
        async with asyncio.timeout(10):
            return await self.generator.start(
                GenerationRequest(id=request_id, prompt=prompt, **values)
            )

    def begin(self, request_id: str, prompt: str | Chat) -> "asyncio.Task[Generation]":
        return asyncio.create_task(self.start(request_id, prompt))


@pytest.fixture
async def house() -> House:
    house = House()
    await house.client.start()
    return house


async def test_the_bound_is_on_prompt_tokens_without_a_first_token(house: House) -> None:
    a = await house.start("a", [1] * 6)
    b = await house.start("b", [1] * 4)
    with pytest.raises(Overloaded, match="10 prompt tokens"):
        await house.start("c", [1])
    assert house.transport.submitted() == ["a", "b"]
    assert (house.queued, house.generator.open_requests) == (10, 2)
    house.transport.token("b")
    c = await house.start("c", [1] * 4)
    house.transport.token("b")
    assert house.queued == 10
    for generation in (a, b, c):
        generation.close()
    assert (house.queued, house.generator.open_requests) == (0, 0)


async def test_a_long_prompt_is_let_in_where_nothing_waits(house: House) -> None:
    running = await house.start("running", [1] * 9)
    house.transport.token("running")
    long = await house.start("long", "x" * 100)
    assert house.queued == 100
    with pytest.raises(Overloaded):
        await house.start("next", [1])
    long.close()
    await house.start("next", [1])
    running.close()


@pytest.mark.parametrize(
    ("prompt", "estimate", "tokens"),
    [
        ("." * 17 + "x", 6, 1),
        ("x" * 8, 3, 8),
        (Chat(messages=[{"role": "user", "content": "x" * 5}] * 2), 4, 40),
        ("x" + "." * 3 * CONTEXT, CONTEXT, 1),
    ],
    ids=["too much", "too little", "chat", "never more than fit"],
)
async def test_an_estimate_is_reserved_and_then_corrected(
    house: House, prompt: str | Chat, estimate: int, tokens: int
) -> None:
    house.tokenizer.gate.clear()
    starting = house.begin("a", prompt)
    await asyncio.sleep(0)
    assert house.queued == estimate
    house.tokenizer.gate.set()
    await starting
    assert house.queued == tokens


async def test_a_chat_is_estimated_again_when_it_is_rendered(house: House) -> None:
    house.tokenizer.gate.clear()
    starting = house.begin("a", Chat(messages=[{"role": "user", "content": "abc"}]))
    async with asyncio.timeout(10):
        while house.queued < 11:
            await asyncio.sleep(0.001)
    house.tokenizer.gate.set()
    await starting
    assert house.queued == 30


async def test_over_the_bound_nothing_is_tokenised(house: House) -> None:
    await house.start("a", [1] * 9)
    house.tokenizer.gate.clear()
    with pytest.raises(Overloaded):
        await house.start("b", "x" * 6)


async def test_more_tokens_than_estimated_may_be_too_many(house: House) -> None:
    await house.start("a", [1] * 3)
    with pytest.raises(Overloaded):
        await house.start("b", "x" * 8)
    assert (house.queued, house.generator.open_requests) == (3, 1)
    assert house.transport.submitted() == ["a"]


async def test_what_can_never_fit_is_refused_as_that_while_others_wait(house: House) -> None:
    await house.start("a", [1] * 9)
    for prompt in ([1] * CONTEXT, "x" * (1000 * CONTEXT + 1)):
        with pytest.raises(InvalidRequest):
            await house.start("b", prompt)


async def test_a_template_may_make_a_chat_too_long_to_tokenise(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.tokenizer.gate.clear()
    monkeypatch.setattr(Crosses, "render", lambda *arguments: "x" * (1000 * CONTEXT + 1))
    with pytest.raises(InvalidRequest, match="more than can fit"):
        await house.start("a", Chat(messages=[{"role": "user", "content": "x"}]))
    assert (house.queued, house.generator.open_requests) == (0, 0)


@pytest.mark.parametrize(
    ("prompt", "values"),
    [
        ("...", {}),
        ("x" * CONTEXT, {}),
        ("xxx", {"min_tokens": 3, "max_tokens": 2}),
        (Chat(messages=[{"role": "user", "content": "x"}], template_kwargs={"a": 1}), {}),
        ("x" * 9, {"prompt_logprobs": 20, "max_tokens": CONTEXT}),
    ],
)
async def test_an_invalid_request_keeps_nothing(
    house: House, prompt: str | Chat, values: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest):
        await house.start("a", prompt, **values)
    assert (house.queued, house.generator.open_requests) == (0, 0)
    assert house.transport.submitted() == []


async def test_a_live_id_keeps_nothing(house: House) -> None:
    await house.start("a", [1] * 3)
    with pytest.raises(InvalidRequest):
        await house.start("a", [1] * 2)
    assert (house.queued, house.generator.open_requests) == (3, 1)


async def test_a_cancel_while_it_is_tokenised_keeps_nothing(house: House) -> None:
    house.tokenizer.gate.clear()
    starting = house.begin("a", "x" * 30)
    await asyncio.sleep(0.01)
    assert house.queued == 10
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    house.tokenizer.gate.set()
    assert (house.queued, house.generator.open_requests) == (0, 0)


async def test_a_cancel_in_the_queue_keeps_nothing(house: House) -> None:
    generation = await house.start("a", [1] * 8)
    generation.close()
    generation.close()
    assert (house.queued, house.generator.open_requests) == (0, 0)
    house.transport.token("a")
    house.transport.end("a", FinishReason.CANCELLED)
    assert (house.queued, house.generator.open_requests) == (0, 0)


@pytest.mark.parametrize("reason", list(FinishReason))
async def test_each_end_without_a_token_keeps_nothing(house: House, reason: FinishReason) -> None:
    generation = await house.start("a", [1] * 8)
    house.transport.end("a", reason)
    # Also where nobody has read it yet.
    assert (house.queued, house.generator.open_requests) == (0, 1)
    try:
        async with asyncio.timeout(10):
            assert [delta.end is not None async for delta in generation] == [True]
    except EngineError:
        assert reason not in (FinishReason.LENGTH, FinishReason.STOP, FinishReason.EOS)
    generation.close()
    assert (house.queued, house.generator.open_requests) == (0, 0)


async def test_choices_wait_for_one_prompt(house: House) -> None:
    generation = await house.start("a", [1] * 8, n=3)
    assert house.queued == 8
    for choice in (1, 0, 2):
        house.transport.token("a", choice)
        assert house.queued == 0
    generation.close()
    assert house.generator.open_requests == 0


async def test_an_engine_that_is_lost_keeps_nothing(house: House) -> None:
    generations = [await house.start(name, [1] * 3) for name in "ab"]
    house.tokenizer.gate.clear()
    starting = house.begin("c", "x" * 9)
    await asyncio.sleep(0)
    assert house.queued == 9
    house.transport.exit("it fell over")
    assert house.queued == 3
    house.tokenizer.gate.set()
    with pytest.raises(EngineUnavailable):
        await starting
    for generation in generations:
        with pytest.raises(EngineUnavailable):
            await anext(aiter(generation))
        generation.close()
    with pytest.raises(EngineUnavailable):
        await house.start("d", [1] * 5)
    assert (house.queued, house.generator.open_requests) == (0, 0)
    await house.client.stop()
