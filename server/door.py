"""The door of every RPC of ours: request id, server span, and the one error handler.

A servicer method is ``async def Method(self, request, call: Call)``; a streaming one writes
its messages with ``call.write``. So a cancelled stream is a ``CancelledError`` in the RPC's
own task, which an async generator suspended in ``yield`` would not get.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import status_pb2

from engine.errors import DeadlineExceeded, GenerationFailed, InvalidRequest
from server.errors import code_of, retry_after_ms, to_status
from server.telemetry import ServerSpan, Telemetry

logger = logging.getLogger(__name__)

Handler = Callable[[Any, Any], Awaitable[Any]]
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True, slots=True)
class Call:
    """One RPC on its way. ``deadline`` is a time of ``time.monotonic``."""

    context: grpc.aio.ServicerContext[Any, Any]
    request_id: str
    deadline: float
    span: ServerSpan
    write_timeout_s: float

    async def write(self, message: Any) -> None:
        """Sends a message of a stream; waits for a client that does not read, but not for ever."""
        try:
            async with asyncio.timeout(self.write_timeout_s):
                await self.context.write(message)
        except TimeoutError:
            text = f"the client has not read for {self.write_timeout_s} s"
            raise DeadlineExceeded(text) from None


@dataclass(frozen=True, slots=True)
class Limits:
    """Longest times, in seconds: a whole request, and one write that its client blocks."""

    request_s: float
    write_s: float


class Door(grpc.aio.ServerInterceptor):
    """Wraps the methods of ``venturi.v1``; health and reflection pass as they are."""

    def __init__(self, telemetry: Telemetry, limits: Limits) -> None:
        self._telemetry = telemetry
        self._limits = limits

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """See grpc.aio."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method.lstrip("/")
        if handler is None or not method.startswith("venturi.v1."):
            return handler
        make, inner = grpc.unary_unary_rpc_method_handler, handler.unary_unary
        if handler.response_streaming:
            make, inner = grpc.unary_stream_rpc_method_handler, handler.unary_stream
        guarded: Any = self._guard(method, inner)  # type: ignore[arg-type]
        return make(guarded, handler.request_deserializer, handler.response_serializer)

    def _guard(self, method: str, handler: Handler) -> Handler:
        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            request_id = getattr(request, "request_id", "") or uuid.uuid4().hex
            valid = _REQUEST_ID.fullmatch(request_id) is not None
            call = self._open(method, request_id if valid else uuid.uuid4().hex, context)
            code = grpc.StatusCode.OK
            try:
                if not valid:
                    raise InvalidRequest("request_id", "use 1 to 128 visible ASCII characters")
                return await handler(request, call)
            except asyncio.CancelledError:
                code = grpc.StatusCode.CANCELLED
                if time.monotonic() >= call.deadline:
                    code = grpc.StatusCode.DEADLINE_EXCEEDED
                raise
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                status = to_status(error, call.request_id)
                code = code_of(status)
                if isinstance(error, GenerationFailed):  # the engine has told why
                    logger.error("request %s failed: %s", call.request_id, error)
                elif code is grpc.StatusCode.INTERNAL:
                    logger.exception("request %s failed", call.request_id)
                await _abort(context, status, call.request_id)
            finally:
                call.span.end(code)

        return guarded

    def _open(
        self, method: str, request_id: str, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Call:
        metadata = dict(context.invocation_metadata() or ())
        span = self._telemetry.server_span(method, metadata, request_id)
        remaining = context.time_remaining()
        longest = self._limits.request_s
        deadline = time.monotonic() + (longest if remaining is None else min(remaining, longest))
        context.set_trailing_metadata((("x-request-id", request_id),))
        return Call(context, request_id, deadline, span, self._limits.write_s)


async def _abort(
    context: grpc.aio.ServicerContext[Any, Any], status: status_pb2.Status, request_id: str
) -> None:
    """Ends the RPC with ``status``; raises ``grpc.aio.AbortError``, as grpc wants it."""
    trailers: list[tuple[str, str | bytes]] = [
        ("x-request-id", request_id),
        ("grpc-status-details-bin", status.SerializeToString()),
    ]
    if (pushback := retry_after_ms(status)) is not None:
        trailers.append(("grpc-retry-pushback-ms", str(pushback)))
    await context.abort(code_of(status), status.message, tuple(trailers))
