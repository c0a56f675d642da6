"""``AdminService``: load, start-up, drain."""

from collections.abc import Awaitable, Callable
from contextlib import suppress

from engine.errors import EngineUnavailable, InvalidRequest, NotServed
from server import convert
from server.door import Call
from server.serving import Progress, Serving
from venturi.v1 import admin_pb2 as pb
from venturi.v1 import admin_pb2_grpc

_MAX_DRAIN_S = 86400.0

# Seconds to wait for what runs -> (completed, ended by force).
Drain = Callable[[float | None], Awaitable[tuple[int, int]]]


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """One instance serves all calls."""

    def __init__(self, serving: Serving, drain: Drain) -> None:
        self._serving = serving
        self._drain = drain

    async def GetLoad(self, request: pb.GetLoadRequest, call: Call) -> pb.GetLoadResponse:
        """See the contract."""
        engine = self._serving.engine
        if engine is None:
            raise EngineUnavailable("the model is not loaded yet")
        stats, totals = engine.last_stats, engine.totals
        with suppress(EngineUnavailable):  # between two engines the last counts are all there is
            stats = await engine.stats()
        return pb.GetLoadResponse(
            queued=stats.queued,
            running=stats.running,
            kv_blocks_used=stats.blocks_used,
            kv_blocks_free=stats.blocks_free,
            kv_blocks_cached=stats.blocks_cached,
            tokens_per_second=self._serving.rate.per_second(),
            prompt_tokens_total=totals.prompt_tokens,
            completion_tokens_total=totals.completion_tokens,
            preemptions_total=totals.preemptions,
            engine_restarts_total=totals.restarts,
        )

    async def WatchStartup(self, request: pb.WatchStartupRequest, call: Call) -> None:
        """See the contract."""
        async for progress in self._serving.progress():
            await call.write(_progress(progress))

    async def SetTraffic(self, request: pb.SetTrafficRequest, call: Call) -> pb.SetTrafficResponse:
        """Not served yet."""
        raise NotServed("weights", "this server serves one variant")

    async def Drain(self, request: pb.DrainRequest, call: Call) -> pb.DrainResponse:
        """See the contract."""
        timeout = None
        if request.HasField("timeout"):
            timeout = convert.seconds(request.timeout)
            if not 0 <= timeout <= _MAX_DRAIN_S:
                raise InvalidRequest("timeout", f"must be from 0 to {_MAX_DRAIN_S} s")
        completed, aborted = await self._drain(timeout)
        return pb.DrainResponse(completed=completed, aborted=aborted)


def _progress(progress: Progress) -> pb.WatchStartupResponse:
    message = pb.WatchStartupResponse(
        phase=progress.phase, detail=progress.detail, item=progress.item, items=progress.items
    )
    if progress.seconds_left is not None:
        message.time_left.CopyFrom(convert.duration(progress.seconds_left))
    return message
