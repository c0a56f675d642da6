"""The composition root: builds the service, leads it up, and takes it down in order."""

import asyncio
import logging
import signal
import time
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from engine.errors import ModelLoadError
from server import __version__
from server.admin import AdminServicer
from server.compressor import CompressionFailed
from server.config import ServerConfig
from server.console import TITLES, StartupDisplay, ready_lines, say
from server.door import Door, Limits
from server.inference import InferenceServicer
from server.metrics import Metrics
from server.models import ModelServicer
from server.quality import Refused
from server.serving import Progress, Serving
from server.startup import start_up
from server.telemetry import Telemetry
from venturi.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)

logger = logging.getLogger(__name__)

_SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (inference_pb2, "InferenceService"),
        (model_pb2, "ModelService"),
        (admin_pb2, "AdminService"),
    )
)
# Health names that follow readiness; "liveness" says SERVING as long as the process answers.
_READINESS = ("", *_SERVICES[:2])
_LIVENESS = ("liveness", _SERVICES[2])
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.max_concurrent_streams", 1024),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]
_STOP_GRACE_S = 0.25
# Exit code of a service that the gate never let serve.
REFUSED = 3


class StartFailed(Exception):
    """One line that names the cause and the remedy."""


class Service:
    """A running server. ``start``, then ``lead_up``, then ``wait``, then ``stop``."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.serving = Serving(config.served_name, config.variant)
        self.serving.on_ready_change = self._ready_changed
        self.port = 0
        version = {"service.version": __version__}
        self._telemetry = Telemetry.from_environment(version)
        self._metrics = Metrics.from_environment(version)
        limits = Limits(config.request_timeout, config.write_timeout)
        self._health = health_aio.HealthServicer()
        self._health_tasks: set[asyncio.Task[None]] = set()
        self._server = grpc.aio.server(
            interceptors=[Door(self._telemetry, limits)], options=_OPTIONS
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceServicer(self.serving), self._server
        )
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(self.serving), self._server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(
            AdminServicer(self.serving, self.drain), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if config.serves_reflection:
            names = (*_SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)

    async def start(self) -> None:
        """Opens the port, NOT_SERVING. Raises ``StartFailed``."""
        for name in _READINESS:
            await self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        for name in _LIVENESS:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        address = f"{host}:{self.config.port}"
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError:
            self.port = 0
        if self.port == 0:
            raise StartFailed(
                f"cannot listen on {address}: in use, or no address of this machine; "
                "choose another --port or --host"
            )
        await self._server.start()
        self._metrics.observe(self.serving)

    async def lead_up(self) -> None:
        """Compresses and loads; ready when it returns. Raises ``StartFailed`` or ``Refused``."""
        try:
            await start_up(self.config, self.serving, self._telemetry)
        except Refused as error:
            self.serving.report(Progress(phase=admin_pb2.PHASE_FAILED, detail=str(error)))
            raise
        except (CompressionFailed, ModelLoadError, OSError) as error:
            self.serving.report(Progress(phase=admin_pb2.PHASE_FAILED, detail=str(error)))
            raise StartFailed(str(error)) from error

    async def drain(self, timeout: float | None = None) -> tuple[int, int]:
        """Refuses new requests and waits for the running ones: (completed, ended by force)."""
        return await self.serving.drain(self.config.drain_timeout if timeout is None else timeout)

    async def stop(self) -> None:
        """Ends everything that is left. Idempotent."""
        # While there still is an engine to ask, and an event loop that is free to answer.
        await asyncio.to_thread(self._metrics.shutdown)
        if self.serving.engine is not None:
            await self.serving.engine.stop()
        # Health.Watch streams never end by themselves and would use up a longer grace.
        await self._server.stop(_STOP_GRACE_S)
        await asyncio.to_thread(self._telemetry.shutdown)

    def _ready_changed(self, ready: bool) -> None:
        task = asyncio.ensure_future(self._set_health(ready))
        self._health_tasks.add(task)
        task.add_done_callback(self._health_tasks.discard)

    async def _set_health(self, ready: bool) -> None:
        Response = health_pb2.HealthCheckResponse
        for name in _READINESS:
            await self._health.set(name, Response.SERVING if ready else Response.NOT_SERVING)


async def serve(config: ServerConfig) -> int:
    """Runs the service until SIGTERM or SIGINT; a second signal ends it at once.

    What the gate refuses keeps the process up, not ready: another start would find the same.
    """
    begin = time.monotonic()
    stop, force = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (force if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    service = Service(config)
    await service.start()
    say(f"listening on {config.host}:{service.port}, {config.served_name}@{config.variant}")
    try:
        with StartupDisplay() as display:
            service.serving.on_progress = display.show
            if not await _first(service.lead_up(), stop):
                return 0
        service.serving.on_progress = _say_phase
        say(ready_lines(config, service.serving, service.port, time.monotonic() - begin))
        await stop.wait()
        say(f"draining, {service.serving.open_requests} requests are open; again to end at once")
        await _first(service.drain(), force)
        return 0
    except Refused as error:
        say(f"{error}. Not ready; GetModel and health answer until the process is ended")
        await stop.wait()
        return REFUSED
    finally:
        await service.stop()


async def _first(work: Any, event: asyncio.Event) -> bool:
    """Runs ``work`` to its end, unless ``event`` comes first: then cancels it, False."""
    task, other = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    await asyncio.wait((task, other), return_when=asyncio.FIRST_COMPLETED)
    other.cancel()
    if task.done():
        await task
        return True
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return False


def _say_phase(progress: Progress) -> None:
    """What happens to a running service; loading again is counted in layers, which is too much."""
    if progress.phase not in (admin_pb2.PHASE_LOADING, admin_pb2.PHASE_DRAINING):
        say(TITLES[progress.phase])
