"""Keeps one engine alive and routes its events to the streams of the open requests."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from engine.client.heartbeat import DEFAULT_SILENCE_S, Heartbeat
from engine.client.stream import Crowd, TokenStream
from engine.client.transport import Transport
from engine.errors import EngineUnavailable, InvalidRequest, ModelLoadError
from engine.figures import StepFigures
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
)
from engine.types import EngineStats, Finished, FinishReason, ModelReport, Request, StepOutput

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 30.0
# An engine that served this long has earned a quick restart.
_STABLE_S = 60.0


_IDLE = EngineStats(
    queued=0,
    running=0,
    blocks_used=0,
    blocks_free=0,
    blocks_cached=0,
    prompt_tokens=0,
    generated_tokens=0,
    preemptions=0,
    cached_tokens=0,
    recomputed_tokens=0,
    drafted_tokens=0,
    accepted_tokens=0,
)


class EngineState(Enum):
    """Life of the engine behind a client."""

    STARTING = "starting"
    READY = "ready"
    UNRESPONSIVE = "unresponsive"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(slots=True)
class Totals:
    """Counts since the front end started; they outlive the engine's incarnations."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    preemptions: int = 0
    restarts: int = 0


class EngineClient:
    """Lives in one event loop. ``on_change`` is called after each change of ``state``,
    ``on_figures`` with what the engine's monitor saw, after the step's other events."""

    def __init__(
        self, make_transport: Callable[[], Transport], silence_s: float = DEFAULT_SILENCE_S
    ) -> None:
        self._make_transport = make_transport
        self._heartbeat = Heartbeat(silence_s, self._ask_for_a_word, self._on_silence)
        self._listening: asyncio.Task[None] | None = None
        self._transport: Transport | None = None
        self._leaving: Transport | None = None  # given up, and perhaps not stopped yet
        self._streams: dict[str, TokenStream] = {}
        self._crowd = Crowd()
        # In the order of the questions; None for those of the heartbeat.
        self._waiting_stats: list[asyncio.Future[EngineStats] | None] = []
        self._ready: asyncio.Future[ModelReport] | None = None
        self._restart: asyncio.Task[None] | None = None
        self._backoff_s = _FIRST_BACKOFF_S
        self._ready_since = 0.0
        self.state = EngineState.STARTING
        self.totals = Totals()
        self.last_stats = _IDLE
        self.report: ModelReport | None = None
        self.last_end = ""  # why the last incarnation ended
        self.on_change: Callable[[], None] = lambda: None
        self.on_loading: Callable[[Loading], None] = lambda loading: None
        self.on_figures: Callable[[StepFigures], None] = lambda figures: None

    def __repr__(self) -> str:
        return f"<EngineClient {self.state.value} open {len(self._streams)}>"

    @property
    def retry_after_s(self) -> float:
        """When it is worth asking again while the engine is not ready."""
        return max(1.0, self._backoff_s)

    async def start(self) -> ModelReport:
        """Starts the engine and waits until it is ready. Raises ``ModelLoadError``."""
        self._ready = asyncio.get_running_loop().create_future()
        self._listening = asyncio.create_task(self._heartbeat.run())
        await self._launch()
        return await self._ready

    def replace(self, make_transport: Callable[[], Transport], why: str) -> None:
        """Ends the engine, and every open request as if it had died, and starts another one.

        The model is then that of ``make_transport``, also in later restarts; a restart that
        waits starts the new one. A client that has stopped or failed stays as it is. The first
        start must have ended.
        """
        assert self.state is not EngineState.STARTING
        if self.state in (EngineState.STOPPED, EngineState.FAILED):
            return
        self._make_transport = make_transport
        self.report = None
        if self._restart is not None and not self._restart.done():
            return
        # The other model's crashes say nothing of this one.
        self._backoff_s = _FIRST_BACKOFF_S
        self._begin_restart(why)

    async def stop(self) -> None:
        """Ends the engine and every request that is still open."""
        self._set_state(EngineState.STOPPED)
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(EngineUnavailable("the engine was stopped"))
        for task in (self._listening, self._restart):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        for transport in (self._leaving, self._transport):
            if transport is not None:
                await transport.stop()
        self._end_all(FinishReason.CANCELLED, "the engine was stopped")

    def submit(self, request: Request) -> TokenStream:
        """Hands a request to the engine. Raises ``EngineUnavailable``."""
        if self.state is not EngineState.READY or self._transport is None:
            raise EngineUnavailable(f"the engine is {self.state.value}", self.retry_after_s)
        if request.id in self._streams:
            raise InvalidRequest("request_id", "a request with this id is running")
        self.totals.prompt_tokens += len(request.prompt)
        stream = self._streams[request.id] = TokenStream(request.choices, self._crowd)
        self._transport.send(Submit(request))
        return stream

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Asks the engine to end a request, or a choice; its terminal event still comes."""
        if self._transport is not None and request_id in self._streams:
            self._transport.send(Cancel(request_id, choice))

    def cancel_all(self) -> None:
        """Asks the engine to end every open request."""
        for request_id in list(self._streams):
            self.cancel(request_id)

    async def stats(self) -> EngineStats:
        """The core's live counts. Raises ``EngineUnavailable``."""
        if self.state is not EngineState.READY or self._transport is None:
            raise EngineUnavailable(f"the engine is {self.state.value}", self.retry_after_s)
        future: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
        self._waiting_stats.append(future)
        self._transport.send(GetStats())
        return await future

    def _ask_for_a_word(self) -> bool:
        if self.state is not EngineState.READY or self._transport is None:
            return False
        self._waiting_stats.append(None)
        self._transport.send(GetStats())
        return True

    def _on_silence(self, silent: bool) -> None:
        """It is not ended: it may only be stopped for a while, and has the open requests."""
        if silent and self.state is EngineState.READY:
            seconds = self._heartbeat.silence_s
            logger.warning(
                "the engine has not answered for %.3g s: not ready until it does", seconds
            )
            self._set_state(EngineState.UNRESPONSIVE)
            self._fail_stats("the engine is unresponsive")
        elif not silent and self.state is EngineState.UNRESPONSIVE:
            logger.warning("the engine answers again")
            self._set_state(EngineState.READY)

    def _fail_stats(self, message: str) -> None:
        """Nobody waits for them any more, but the answers still come."""
        for future in self._waiting_stats:
            if future is not None and not future.done():
                future.set_exception(EngineUnavailable(message))

    def _set_state(self, state: EngineState) -> None:
        if self.state is not state:
            self.state = state
            self.on_change()

    def _on_message(self, message: FromEngine) -> None:
        self._heartbeat.heard()
        match message:
            case Events(output=output):
                self._on_events(output)
                if output.figures is not None:
                    self._on_step_figures(output.figures)
            case Stats(stats=stats):
                self.last_stats = stats
                future = self._waiting_stats.pop(0) if self._waiting_stats else None
                if future is not None and not future.done():
                    future.set_result(stats)
            case Loading():
                self.on_loading(message)
            case Ready(report=report):
                self._on_ready(report)
            case LoadFailed(message=text):
                self._on_load_failed(text)

    def _on_step_figures(self, figures: StepFigures) -> None:
        """What watches must not harm what serves."""
        try:
            self.on_figures(figures)
        except Exception:
            logger.exception("the monitor's figures cannot be taken in")

    def _on_events(self, output: StepOutput) -> None:
        self.totals.completion_tokens += len(output.tokens)
        for prompt in output.prompts:
            if (stream := self._streams.get(prompt.id)) is not None:
                stream.put_prompt(prompt.tokens)
        for event in output.tokens:
            if (stream := self._streams.get(event.id)) is not None:
                stream.put_token(event)
        for finished in output.finished:
            self.totals.preemptions += finished.preemptions
            if (stream := self._streams.get(finished.id)) is not None:
                stream.put_finished(finished)
                if stream.ended:
                    del self._streams[finished.id]

    def _on_ready(self, report: ModelReport) -> None:
        if self.state is EngineState.STOPPED:
            return
        self.report = report
        self._ready_since = time.monotonic()
        self._set_state(EngineState.READY)
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(report)

    def _on_load_failed(self, text: str) -> None:
        """Final at the first start. Later the cause may pass, so that its exit restarts it."""
        if self.state is EngineState.STARTING:
            self._fail(ModelLoadError(text))
        else:
            logger.error("the engine cannot load the model: %s", text)

    def _fail(self, error: Exception) -> None:
        self._set_state(EngineState.FAILED)
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)

    def _on_exit(self, how: str) -> None:
        if self.state in (EngineState.STOPPED, EngineState.FAILED):
            return
        if self.state is EngineState.STARTING:
            self._fail(ModelLoadError(f"{how} while it loaded the model"))
            return
        served = self.state in (EngineState.READY, EngineState.UNRESPONSIVE)
        if served and time.monotonic() - self._ready_since > _STABLE_S:
            self._backoff_s = _FIRST_BACKOFF_S
        self._begin_restart(how)

    def _begin_restart(self, why: str) -> None:
        self._leaving, self._transport = self._transport, None
        self._heartbeat.forget()
        self.last_end = why
        self._set_state(EngineState.RESTARTING)
        logger.warning("%s; restart in %.1f s", why, self._backoff_s)
        self.last_stats = _IDLE
        self._end_all(FinishReason.LOST, why)
        self._restart = asyncio.create_task(self._restart_later())

    async def _restart_later(self) -> None:
        while True:
            if self._leaving is not None:
                await self._leaving.stop()
                self._leaving = None
            await asyncio.sleep(self._backoff_s)
            self._backoff_s = min(2 * self._backoff_s, _MAX_BACKOFF_S)
            self.totals.restarts += 1
            make_transport = self._make_transport
            try:
                await self._launch()
            except OSError as error:  # no process, no memory, no folder: perhaps later
                logger.warning("cannot start an engine: %s", error)
            else:
                if make_transport is self._make_transport:
                    return
            # Not started, or replaced meanwhile.
            self._leaving, self._transport = self._transport, None

    async def _launch(self) -> None:
        """Starts an incarnation. What one says that was given up already is not heard."""
        make_transport = self._make_transport
        transport = self._transport = make_transport()

        def is_wanted() -> bool:
            return transport is self._transport and make_transport is self._make_transport

        def on_message(message: FromEngine) -> None:
            if is_wanted():
                self._on_message(message)

        def on_exit(how: str) -> None:
            if is_wanted():
                self._on_exit(how)

        await transport.start(on_message, on_exit)

    def _end_all(self, reason: FinishReason, message: str) -> None:
        streams, self._streams = self._streams, {}
        for request_id, stream in streams.items():
            for choice in range(stream.choices):
                stream.put_finished(
                    Finished(
                        id=request_id,
                        reason=reason,
                        choice=choice,
                        scheduled_at=None,
                        first_token_at=None,
                        finished_at=time.monotonic(),
                        message=message,
                    )
                )
        self._fail_stats(message)
        self._waiting_stats = []
