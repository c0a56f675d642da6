"""What the service is doing: which phase it is in, what it serves, who may come in."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from engine.client.engine_client import EngineClient, EngineState
from engine.client.generation import Generator
from engine.errors import EngineUnavailable, UnknownModel
from server.monitoring import Watch
from server.provenance import Provenance
from server.quality import GateResult
from venturi.v1 import admin_pb2 as pb

_RETRY_AFTER_S = 1.0
_ABORT_S = 1.0
ENDED = (pb.PHASE_READY, pb.PHASE_FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """State of the start-up. ``items`` is 0 where nothing is counted."""

    phase: pb.Phase
    detail: str = ""
    item: int = 0
    items: int = 0
    seconds_left: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    """``variant`` was given up for the original, for the ``reason`` that an alarm gave."""

    variant: str
    reason: str


class Serving:
    """One served model. ``on_ready_change`` hears when ``ready`` turns."""

    def __init__(self, name: str, variant: str) -> None:
        self.name = name
        self.variant = variant
        self.engine: EngineClient | None = None
        self.provenance = Provenance()
        self.gate: GateResult | None = None
        self.watch: Watch | None = None
        self.fallback: Fallback | None = None
        self.rate = TokenRate()
        self.on_progress: Callable[[Progress], None] = lambda progress: None
        self.on_ready_change: Callable[[bool], None] = lambda ready: None
        self._generator: Generator | None = None
        self._accepted = 0
        self._progress = Progress(phase=pb.PHASE_STARTING)
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Serving {self.name}@{self.variant} {pb.Phase.Name(self._progress.phase)}>"

    @property
    def ready(self) -> bool:
        """Whether a request that comes now is served."""
        return self._progress.phase == pb.PHASE_READY

    @property
    def open_requests(self) -> int:
        """Accepted and not ended."""
        return 0 if self._generator is None else self._generator.open_requests

    def find(self, model: str) -> None:
        """Raises ``UnknownModel`` unless ``model`` is "", the name or name@variant.

        Who asks for a variant that fell back gets the original, and is told so in the answer.
        """
        given_up = () if self.fallback is None else (self.fallback.variant,)
        variants = {f"{self.name}@{variant}" for variant in (self.variant, *given_up)}
        if model not in {"", self.name, *variants}:
            raise UnknownModel(model)

    def generator(self, model: str) -> Generator:
        """Raises ``UnknownModel``, or ``EngineUnavailable`` while nothing can be served."""
        self.find(model)
        if self._generator is None or not self.ready:
            if self.gate is not None and self.gate.refused:
                # Another replica may serve, and soon; this one will not.
                raise EngineUnavailable(f"refused by the gate: {self.gate.line}", _RETRY_AFTER_S)
            phase = pb.Phase.Name(self._progress.phase).removeprefix("PHASE_").lower()
            retry = _RETRY_AFTER_S if self.engine is None else self.engine.retry_after_s
            raise EngineUnavailable(f"the service is {phase}", retry)
        return self._generator

    def loaded_generator(self) -> Generator:
        """The generator even while nothing is accepted. ``EngineUnavailable`` before loading."""
        if self._generator is None:
            raise EngineUnavailable("the model is not loaded yet", _RETRY_AFTER_S)
        return self._generator

    def next_id(self, request_id: str) -> str:
        """An engine id: two callers may use the same request id at once."""
        self._accepted += 1
        return f"{self._accepted}-{request_id}"

    def report(self, progress: Progress) -> None:
        """Takes in the next state. A draining service stays so."""
        was_ready = self.ready
        if self._progress.phase == pb.PHASE_DRAINING:
            return
        self._progress = progress
        self._changed.set()
        self._changed = asyncio.Event()
        self.on_progress(progress)
        if self.ready != was_ready:
            self.on_ready_change(self.ready)

    def open(self, generator: Generator) -> None:
        """The engine is loaded: requests may come, and its state is ours from now on."""
        self.engine, self._generator = generator.engine, generator
        generator.engine.on_change = self._follow_engine
        verdict = "" if self.gate is None else self.gate.line
        self.report(Progress(phase=pb.PHASE_READY, detail=verdict))

    async def progress(self) -> AsyncIterator[Progress]:
        """The present state, then each change, until ready or failed."""
        while True:
            changed, progress = self._changed, self._progress
            yield progress
            if progress.phase in ENDED:
                return
            if progress is self._progress:
                await changed.wait()

    def _follow_engine(self) -> None:
        assert self.engine is not None
        phases = {
            EngineState.READY: pb.PHASE_READY,
            EngineState.UNRESPONSIVE: pb.PHASE_UNRESPONSIVE,
            EngineState.RESTARTING: pb.PHASE_RESTARTING,
            EngineState.FAILED: pb.PHASE_FAILED,
        }
        phase = phases.get(self.engine.state)
        if phase is not None:
            restarting = self.engine.state is EngineState.RESTARTING
            detail = self.engine.last_end if restarting else ""
            self.report(Progress(phase=phase, detail=detail))

    async def drain(self, timeout: float) -> tuple[int, int]:
        """Refuses what comes, waits for what runs; (completed, ended by force)."""
        before = self.open_requests
        self.report(Progress(phase=pb.PHASE_DRAINING))
        give_up = time.monotonic() + timeout
        while self.open_requests and time.monotonic() < give_up:
            await asyncio.sleep(0.02)
        left = self.open_requests
        if left and self.engine is not None:
            give_up += _ABORT_S
            while self.open_requests and time.monotonic() < give_up:
                # Again and again: a request may still have been in the tokeniser.
                self.engine.cancel_all()
                await asyncio.sleep(0.02)
        return before - left, left


class TokenRate:
    """Tokens per second over the last ten seconds."""

    _WINDOW_S = 10

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counts: dict[int, int] = {}

    def add(self, tokens: int) -> None:
        """Counts tokens that go out now."""
        second = int(self._clock())
        self._counts[second] = self._counts.get(second, 0) + tokens
        if len(self._counts) > 2 * self._WINDOW_S:
            self._drop_old()

    def per_second(self) -> float:
        """The mean rate."""
        self._drop_old()
        return sum(self._counts.values()) / self._WINDOW_S

    def _drop_old(self) -> None:
        oldest = int(self._clock()) - self._WINDOW_S
        self._counts = {second: n for second, n in self._counts.items() if second > oldest}
