"""The engine's keeper: start, restart with growing pauses, stop; with a transport made of paper."""

import asyncio
import dataclasses
import gc
import itertools
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.client import engine_client
from engine.client.engine_client import EngineClient, EngineState
from engine.client.heartbeat import Heartbeat
from engine.client.process import ProcessTransport
from engine.client.stream import Coalescing, Slice, TokenStream
from engine.config import EngineConfig, SchedulerConfig
from engine.core import EngineCore
from engine.errors import EngineUnavailable, InvalidRequest, ModelLoadError
from engine.figures import StepFigures
from engine.local import LocalTransport
from engine.messages import (
    Cancel,
    Events,
    FromEngine,
    GetStats,
    LoadFailed,
    Loading,
    Ready,
    Stats,
    Submit,
    ToEngine,
)
from engine.testing import ArithmeticRunner
from engine.types import (
    Finished,
    FinishReason,
    PromptLogprobs,
    Request,
    StepOutput,
    TokenEvent,
    TokenLogprobs,
)

MakeRequest = Callable[..., Request]
CORE = EngineCore(ArithmeticRunner(), SchedulerConfig())
READY = Ready(CORE.report())


class Paper:
    """A transport that does what the test says, by calling ``message`` and ``exit``."""

    def __init__(self, on_start: str = "") -> None:
        self.on_start = on_start
        self.made_at = time.monotonic()
        self.sent: list[ToEngine] = []
        self.stopped = 0
        self.message: Callable[[FromEngine], None] = lambda message: None
        self.exit: Callable[[str], None] = lambda how: None

    async def start(
        self, on_message: Callable[[FromEngine], None], on_exit: Callable[[str], None]
    ) -> None:
        self.message, self.exit = on_message, on_exit
        loop = asyncio.get_running_loop()
        match self.on_start:
            case "raise":
                raise OSError("no process can be started")
            case "ready":
                loop.call_soon(on_message, READY)
            case "exit":
                loop.call_soon(on_exit, "it fell over")
            case "slow":
                await asyncio.sleep(0.1)

    def send(self, message: ToEngine) -> None:
        self.sent.append(message)

    async def stop(self) -> None:
        self.stopped += 1


class Shop:
    """Makes the transports in the order of ``plan``; the last plan goes on for ever."""

    def __init__(self, *plan: str) -> None:
        self.plan = plan
        self.made: list[Paper] = []

    def __call__(self) -> Paper:
        self.made.append(Paper(self.plan[min(len(self.made), len(self.plan) - 1)]))
        return self.made[-1]


async def until(condition: Callable[[], bool], timeout: float = 5.0) -> None:
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.005)


async def started(*plan: str) -> tuple[EngineClient, Shop]:
    shop = Shop(*plan)
    client = EngineClient(shop)
    async with asyncio.timeout(5):
        await client.start()
    return client, shop


def ended(request_id: str, reason: FinishReason = FinishReason.LENGTH) -> Finished:
    return Finished(
        id=request_id, reason=reason, scheduled_at=None, first_token_at=None, finished_at=1.0
    )


async def read(stream: TokenStream) -> Slice:
    async with asyncio.timeout(5):
        return await stream.next(Coalescing())


async def test_start_waits_for_the_model_and_tells_of_loading() -> None:
    shop, client = Shop(""), None
    client = EngineClient(shop)
    loaded: list[Loading] = []
    states: list[EngineState] = []
    client.on_loading = loaded.append
    client.on_change = lambda: states.append(client.state)
    starting = asyncio.ensure_future(client.start())
    await until(lambda: bool(shop.made))
    shop.made[0].message(Loading(1, 2, "m"))
    await asyncio.sleep(0.01)
    assert not starting.done()
    assert client.state is EngineState.STARTING
    shop.made[0].message(READY)
    assert await starting == client.report == READY.report
    assert loaded == [Loading(1, 2, "m")]
    assert states == [EngineState.READY]


async def test_a_model_that_cannot_be_loaded_is_not_tried_again() -> None:
    shop = Shop("")
    client = EngineClient(shop)
    starting = asyncio.ensure_future(client.start())
    await until(lambda: bool(shop.made))
    shop.made[0].message(LoadFailed("config.json is missing"))
    shop.made[0].exit("the engine process ended with code 2")
    with pytest.raises(ModelLoadError, match=r"config\.json is missing"):
        await starting
    assert client.state is EngineState.FAILED
    await asyncio.sleep(0.15)
    assert len(shop.made) == 1


async def test_an_engine_that_dies_while_it_loads_is_a_load_error() -> None:
    with pytest.raises(ModelLoadError, match="fell over"):
        await started("exit")


async def test_before_it_is_ready_nothing_is_accepted(make_request: MakeRequest) -> None:
    client = EngineClient(Shop(""))
    with pytest.raises(EngineUnavailable):
        client.submit(make_request("a"))
    with pytest.raises(EngineUnavailable):
        await client.stats()


async def test_events_find_their_streams(make_request: MakeRequest) -> None:
    client, shop = await started("ready")
    streams = {name: client.submit(make_request(name)) for name in "ab"}
    assert [m.request.id for m in shop.made[0].sent if isinstance(m, Submit)] == ["a", "b"]
    tokens = [TokenEvent(id=name, token=n) for n, name in enumerate("abcb")]
    shop.made[0].message(Events(StepOutput([], tokens, [ended("b"), ended("stranger")])))
    assert await read(streams["a"]) == Slice([tokens[0]], None)
    assert await read(streams["b"]) == Slice([tokens[1], tokens[3]], ended("b"))


async def test_prompt_logprobs_find_their_streams(make_request: MakeRequest) -> None:
    client, shop = await started("ready")
    streams = {name: client.submit(make_request(name)) for name in "ab"}
    parts = [TokenLogprobs(n, -1.0, 1, []) for n in range(3)]
    for prompts in (
        [PromptLogprobs("b", parts[:2]), PromptLogprobs("stranger", parts)],
        [PromptLogprobs("b", parts[2:])],
    ):
        shop.made[0].message(Events(StepOutput(prompts)))
    assert streams["a"].prompt == []
    assert streams["b"].prompt == parts


async def test_a_request_is_open_until_its_last_choice_has_ended(
    make_request: MakeRequest,
) -> None:
    client, shop = await started("ready")
    stream = client.submit(make_request("a", choices=2))
    one, two = (dataclasses.replace(ended("a"), choice=choice) for choice in (1, 0))
    shop.made[0].message(Events(StepOutput(finished=[one])))
    client.cancel("a", 0)
    token = TokenEvent(id="a", token=4)
    shop.made[0].message(Events(StepOutput([], [token], [two])))
    assert await read(stream) == Slice([token], two, 0)
    assert await read(stream) == Slice([], one, 1)
    client.cancel("a", 0)
    cancels = [message for message in shop.made[0].sent if isinstance(message, Cancel)]
    assert cancels == [Cancel("a", 0)], "the second one came too late"


async def test_a_dead_engine_ends_the_choices_that_still_run(make_request: MakeRequest) -> None:
    client, shop = await started("ready")
    stream = client.submit(make_request("a", choices=3))
    shop.made[0].message(Events(StepOutput(finished=[ended("a")])))
    shop.made[0].exit("it fell over")
    ends = [(await read(stream)).finished for _ in range(3)]
    reasons = [end.reason for end in ends if end is not None]
    assert reasons == [FinishReason.LENGTH, FinishReason.LOST, FinishReason.LOST]


async def test_a_live_id_is_refused_and_its_first_owner_goes_on(make_request: MakeRequest) -> None:
    client, shop = await started("ready")
    first = client.submit(make_request("same"))
    with pytest.raises(InvalidRequest):
        client.submit(make_request("same"))
    tokens = [TokenEvent(id="same", token=5)]
    shop.made[0].message(Events(StepOutput([], tokens, [ended("same")])))
    assert await read(first) == Slice(tokens, ended("same"))
    client.submit(make_request("same"))


async def test_cancel_goes_to_the_engine_for_open_requests_only(make_request: MakeRequest) -> None:
    client, shop = await started("ready")
    for name in "abc":
        client.submit(make_request(name))
    client.cancel("nobody")
    client.cancel("b")
    shop.made[0].message(Events(StepOutput(finished=[ended("b")])))
    client.cancel("b")
    client.cancel_all()
    cancels = [message.id for message in shop.made[0].sent if isinstance(message, Cancel)]
    assert cancels == ["b", "a", "c"]


async def test_stats_are_answered_in_order_also_where_somebody_left() -> None:
    client, shop = await started("ready")
    asked = [asyncio.ensure_future(client.stats()) for _ in range(3)]
    await until(lambda: shop.made[0].sent.count(GetStats()) == 3)
    asked[0].cancel()
    await asyncio.sleep(0)
    for queued in range(3):
        core = EngineCore(ArithmeticRunner(num_blocks=queued + 1), SchedulerConfig())
        shop.made[0].message(Stats(core.stats()))
    assert [(await one).blocks_free for one in asked[1:]] == [2, 3]


async def test_a_dead_engine_ends_its_streams_and_is_started_again(
    make_request: MakeRequest,
) -> None:
    client, shop = await started("ready")
    streams = [client.submit(make_request(name)) for name in "ab"]
    asked = asyncio.ensure_future(client.stats())
    await asyncio.sleep(0)
    shop.made[0].exit("it fell over")
    assert client.state is EngineState.RESTARTING
    for stream in streams:
        last = (await read(stream)).finished
        assert last is not None
        assert (last.reason, last.message) == (FinishReason.LOST, "it fell over")
    with pytest.raises(EngineUnavailable):
        await asked
    with pytest.raises(EngineUnavailable) as caught:
        client.submit(make_request("c"))
    assert caught.value.retry_after_s > 0
    await until(lambda: client.state is EngineState.READY)
    assert client.totals.restarts == 1
    assert shop.made[0].stopped == 1
    client.submit(make_request("a"))
    assert [type(message) for message in shop.made[1].sent] == [Submit]


async def test_a_replaced_engine_is_stopped_and_heard_no_more(make_request: MakeRequest) -> None:
    client, shop = await started("ready")
    heard: list[StepFigures] = []
    client.on_figures = heard.append
    figures = StepFigures(non_finite_logits=1)
    streams = [client.submit(make_request(name)) for name in "ab"]
    shop.made[0].message(Events(StepOutput(finished=[ended("a")], figures=figures)))
    assert heard == [figures]
    others = Shop("ready", "ready")
    client.replace(others, "its numbers overflow")
    assert client.state is EngineState.RESTARTING
    assert client.report is None
    ends = [(await read(stream)).finished for stream in streams]
    assert [end.reason for end in ends if end] == [FinishReason.LENGTH, FinishReason.LOST]
    with pytest.raises(EngineUnavailable):
        client.submit(make_request("c"))
    # Its end was asked for, and what it says on its way is of another model.
    shop.made[0].message(READY)
    shop.made[0].message(Events(StepOutput(figures=figures)))
    shop.made[0].exit("the engine process ended with code 0")
    await until(lambda: client.state is EngineState.READY)
    assert heard == [figures]
    assert shop.made[0].stopped == 1
    assert (len(shop.made), len(others.made)) == (1, 1)
    assert client.totals.restarts == 1
    others.made[0].exit("it fell over")
    await until(lambda: client.state is EngineState.READY)
    assert (len(shop.made), len(others.made)) == (1, 2)


async def test_stop_ends_an_engine_that_is_being_replaced() -> None:
    client, shop = await started("ready")
    client.replace(Shop("ready"), "its numbers overflow")
    await client.stop()
    assert shop.made[0].stopped == 1
    assert client.state is EngineState.STOPPED


async def test_replacing_while_a_restart_waits_changes_what_starts() -> None:
    client, shop = await started("ready")
    shop.made[0].exit("it fell over")
    others = Shop("ready")
    client.replace(others, "its numbers overflow")
    assert client.report is None
    await until(lambda: client.state is EngineState.READY)
    assert (len(shop.made), len(others.made)) == (1, 1)
    assert client.totals.restarts == 1
    await client.stop()


async def test_replacing_an_engine_that_loads_again_ends_it() -> None:
    client, shop = await started("ready", "")
    shop.made[0].exit("it fell over")
    await until(lambda: len(shop.made) == 2)
    await asyncio.sleep(0.01)
    others = Shop("ready")
    client.replace(others, "its numbers overflow")
    shop.made[1].message(READY)
    assert client.state is EngineState.RESTARTING, "that was the model which was given up"
    await until(lambda: client.state is EngineState.READY)
    assert shop.made[1].stopped == 1
    assert (len(shop.made), len(others.made)) == (2, 1)
    await client.stop()


async def test_replacing_while_a_process_is_being_started_starts_the_other_model() -> None:
    client, shop = await started("ready", "slow")
    shop.made[0].exit("it fell over")
    await until(lambda: len(shop.made) == 2)
    others = Shop("ready")
    client.replace(others, "its numbers overflow")
    await until(lambda: client.state is EngineState.READY)
    assert (len(shop.made), len(others.made)) == (2, 1)
    assert shop.made[1].stopped == 1
    await client.stop()


async def test_a_stopped_client_is_not_replaced() -> None:
    client, shop = await started("ready")
    await client.stop()
    others = Shop("ready")
    client.replace(others, "its numbers overflow")
    await asyncio.sleep(0.2)
    assert client.state is EngineState.STOPPED
    assert not others.made
    assert shop.made[0].stopped == 1


async def test_a_replacement_does_not_inherit_the_pauses_of_crashes() -> None:
    client, shop = await started("ready", "exit", "exit", "exit", "ready")
    shop.made[0].exit("it fell over")
    await until(lambda: client.state is EngineState.READY)
    assert client.retry_after_s > 1.0
    client.replace(Shop("ready"), "its numbers overflow")
    assert client.retry_after_s == 1.0
    await client.stop()


async def test_figures_that_cannot_be_taken_in_harm_no_request(
    make_request: MakeRequest, caplog: pytest.LogCaptureFixture
) -> None:
    client, shop = await started("ready")

    def fail(figures: StepFigures) -> None:
        raise ZeroDivisionError

    client.on_figures = fail
    stream = client.submit(make_request("a"))
    shop.made[0].message(Events(StepOutput(figures=StepFigures(non_finite_logits=1))))
    shop.made[0].message(Events(StepOutput(finished=[ended("a")])))
    assert (await read(stream)).finished == ended("a")
    assert client.state is EngineState.READY
    assert "figures cannot be taken in" in caplog.text


async def test_pauses_between_restarts_grow() -> None:
    client, shop = await started("ready", "exit", "exit", "ready")
    shop.made[0].exit("it fell over")
    await until(lambda: client.state is EngineState.READY)
    times = [paper.made_at for paper in shop.made]
    pauses = [b - a for a, b in itertools.pairwise(times)]
    assert len(pauses) == 3
    assert pauses[0] >= 0.1
    assert pauses[1] >= 0.2
    assert pauses[2] >= 0.4
    assert client.totals.restarts == 3


async def test_a_restart_that_cannot_even_begin_is_tried_again() -> None:
    client, shop = await started("ready", "raise", "ready")
    shop.made[0].exit("it fell over")
    await until(lambda: client.state is EngineState.READY)
    assert len(shop.made) == 3


async def test_a_restart_that_cannot_load_is_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The cause may pass: a disk that comes back, memory that is freed."""
    client, shop = await started("ready", "", "ready")
    shop.made[0].exit("it fell over")
    await until(lambda: len(shop.made) == 2)
    await asyncio.sleep(0.01)
    shop.made[1].message(LoadFailed("the disk is gone"))
    shop.made[1].exit("the engine process ended with code 2")
    assert client.state is EngineState.RESTARTING
    assert "the disk is gone" in caplog.text
    await until(lambda: client.state is EngineState.READY)
    assert client.totals.restarts == 2


async def test_pauses_grow_while_loading_fails_after_a_long_time_of_service(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only an engine that served has earned a quick restart, not one that died loading."""
    client, shop = await started("ready", "exit")
    # The client's clock alone: the event loop goes by the real one.
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + 1000.0)
    monkeypatch.setattr(engine_client, "time", later)
    shop.made[0].exit("it fell over")
    await asyncio.sleep(0.8)
    assert len(shop.made) <= 4
    await client.stop()


async def test_stop_ends_open_streams_and_the_engine(make_request: MakeRequest) -> None:
    client, shop = await started("ready")
    stream = client.submit(make_request("a"))
    await client.stop()
    last = (await read(stream)).finished
    assert last is not None
    assert last.reason in (FinishReason.ERROR, FinishReason.CANCELLED)
    assert client.state is EngineState.STOPPED
    assert shop.made[0].stopped == 1
    with pytest.raises(EngineUnavailable):
        client.submit(make_request("b"))
    await client.stop()


async def test_stop_while_a_restart_waits_starts_nothing_more() -> None:
    client, shop = await started("ready")
    shop.made[0].exit("it fell over")
    await client.stop()
    await asyncio.sleep(0.2)
    assert len(shop.made) == 1
    assert client.state is EngineState.STOPPED


async def test_a_stopped_client_is_not_revived_by_late_messages() -> None:
    """An engine that was loading when it was told to stop may still say that it is ready."""
    client, shop = await started("ready")
    await client.stop()
    shop.made[0].message(READY)
    shop.made[0].exit("the engine process ended with code 0")
    await asyncio.sleep(0.2)
    assert client.state is EngineState.STOPPED
    assert len(shop.made) == 1


async def test_stop_ends_a_start_that_still_waits() -> None:
    client = EngineClient(Shop(""))
    starting = asyncio.ensure_future(client.start())
    await asyncio.sleep(0.01)
    await client.stop()
    with pytest.raises(EngineUnavailable):
        await asyncio.wait_for(starting, 1.0)
    assert client.state is EngineState.STOPPED


async def test_a_thread_that_was_loading_when_it_was_stopped_stays_stopped() -> None:
    made: list[int] = []

    def slow() -> EngineCore:
        made.append(1)
        time.sleep(0.1)
        return EngineCore(ArithmeticRunner(), SchedulerConfig())

    client = EngineClient(lambda: LocalTransport(slow))
    starting = asyncio.ensure_future(client.start())
    await until(lambda: bool(made))
    await client.stop()
    await asyncio.sleep(0.3)
    starting.cancel()
    assert client.state is EngineState.STOPPED
    assert len(made) == 1


async def test_a_thread_that_cannot_load_says_why() -> None:
    def fail() -> EngineCore:
        raise ModelLoadError("no such folder")

    client = EngineClient(lambda: LocalTransport(fail))
    with pytest.raises(ModelLoadError, match="no such folder"):
        await client.start()
    await client.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_thread_that_falls_over_while_it_loads_is_a_load_error() -> None:
    def fail() -> EngineCore:
        raise ZeroDivisionError

    client = EngineClient(lambda: LocalTransport(fail))
    with pytest.raises(ModelLoadError, match="failed while it loaded"):
        await client.start()
    await client.stop()


async def test_a_transport_may_be_stopped_twice_or_before_its_start() -> None:
    transport = LocalTransport(lambda: EngineCore(ArithmeticRunner(), SchedulerConfig()))
    await transport.stop()
    await transport.stop()


async def test_a_process_without_a_socket_is_an_os_error(tmp_path: Path) -> None:
    """So that the client tries again later."""
    transport = ProcessTransport(EngineConfig(model_dir=tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            await transport.start(lambda message: None, lambda how: None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    await transport.stop()


async def test_a_process_that_cannot_be_started_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    gc.collect()  # what other tests left must not be closed meanwhile
    before = os.listdir("/proc/self/fd")
    transport = ProcessTransport(EngineConfig(model_dir=tmp_path))
    with pytest.raises(OSError, match="nothing"):
        await transport.start(lambda message: None, lambda how: None)
    await transport.stop()
    assert os.listdir("/proc/self/fd") == before


async def test_a_stop_that_is_cancelled_can_be_repeated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    transport = ProcessTransport(EngineConfig(model_dir=tmp_path))
    with pytest.raises(OSError, match="nothing"):
        await transport.start(lambda message: None, lambda how: None)
    first = asyncio.ensure_future(transport.stop())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert first.cancelled()
    await transport.stop()


async def test_a_process_that_cannot_load_says_why_before_it_ends(tmp_path: Path) -> None:
    said: list[FromEngine | str] = []
    ended = asyncio.Event()
    transport = ProcessTransport(EngineConfig(model_dir=tmp_path / "nothing"))
    await transport.start(said.append, lambda how: (said.append(how), ended.set())[0])
    await asyncio.wait_for(ended.wait(), 30)
    failure, how = said
    assert isinstance(failure, LoadFailed)
    assert how == "the engine process ended with code 2"
    await transport.stop()


async def test_totals_outlive_the_engine(make_request: MakeRequest) -> None:
    client, shop = await started("ready")
    client.submit(make_request("a", 5))
    tokens = [TokenEvent(id="a", token=1), TokenEvent(id="a", token=2)]
    shop.made[0].message(Events(StepOutput([], tokens)))
    shop.made[0].exit("it fell over")
    await until(lambda: client.state is EngineState.READY)
    client.submit(make_request("a", 3))
    preempted = dataclasses.replace(ended("a"), preemptions=2)
    shop.made[1].message(Events(StepOutput([], tokens, [preempted])))
    totals = client.totals
    assert (totals.prompt_tokens, totals.completion_tokens) == (8, 4)
    assert (totals.preemptions, totals.restarts) == (2, 1)


class Silence:
    """A client that takes 50 ms for silence, and what it told."""

    def __init__(self) -> None:
        self.shop = Shop("ready")
        self.client = EngineClient(self.shop, silence_s=0.05)
        self.states: list[EngineState] = []
        self.client.on_change = lambda: self.states.append(self.client.state)

    async def start(self) -> Paper:
        async with asyncio.timeout(5):
            await self.client.start()
        return self.shop.made[0]

    async def until(self, state: EngineState) -> None:
        await until(lambda: self.client.state is state)


async def test_an_engine_that_does_not_answer_is_unresponsive_until_it_does(
    make_request: MakeRequest,
) -> None:
    silence = Silence()
    paper = await silence.start()
    stream = silence.client.submit(make_request("a"))
    waiting = asyncio.ensure_future(silence.client.stats())
    await silence.until(EngineState.UNRESPONSIVE)
    with pytest.raises(EngineUnavailable, match="the engine is unresponsive"):
        silence.client.submit(make_request("b"))
    with pytest.raises(EngineUnavailable, match="unresponsive"):
        await waiting
    asked = paper.sent.count(GetStats())
    await asyncio.sleep(0.1)
    assert paper.sent.count(GetStats()) == asked  # nothing more until it answers
    paper.message(Events(StepOutput(finished=[ended("a")])))
    assert silence.client.state is EngineState.READY
    assert (await read(stream)).finished == ended("a")
    assert silence.states == [EngineState.READY, EngineState.UNRESPONSIVE, EngineState.READY]
    assert len(silence.shop.made) == 1
    await silence.client.stop()


async def test_an_answer_goes_to_who_asked() -> None:
    """The heartbeat's answers are nobody's."""
    silence = Silence()
    paper = await silence.start()
    await until(lambda: GetStats() in paper.sent)
    waiting = asyncio.ensure_future(silence.client.stats())
    await asyncio.sleep(0)
    first, second = (dataclasses.replace(CORE.stats(), queued=n) for n in (1, 2))
    paper.message(Stats(first))
    assert not waiting.done()
    paper.message(Stats(second))
    assert (await waiting).queued == 2
    await silence.client.stop()


async def test_an_engine_that_answers_stays_ready() -> None:
    now, asked, changes = 0.0, list[float](), list[bool]()

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        if asked and now - asked[-1] > 9.0 and now < 100.0:
            heartbeat.heard()
        if now > 200.0:
            raise asyncio.CancelledError

    def ask() -> bool:
        asked.append(now)
        return True

    heartbeat = Heartbeat(10.0, ask, changes.append, clock=lambda: now, sleep=sleep)
    with pytest.raises(asyncio.CancelledError):
        await heartbeat.run()
    assert len([at for at in asked if at < 100.0]) >= 8
    assert changes == [True], "its last answer was before 100 s"
    heartbeat.heard()
    assert changes == [True, False]


async def test_an_unresponsive_engine_that_dies_is_restarted() -> None:
    silence = Silence()
    paper = await silence.start()
    await silence.until(EngineState.UNRESPONSIVE)
    paper.exit("it fell over")
    await until(lambda: len(silence.shop.made) == 2)
    await silence.until(EngineState.READY)
    await silence.client.stop()
