"""OpenTelemetry traces: one server span for each RPC, one child for each phase.

Off, and free, unless OTEL_EXPORTER_OTLP_ENDPOINT (or its _TRACES_ form) is set. Spans are
made from measured times after the fact, so nothing is attached to a task that may be
cancelled, and there are at most five for a request. Names follow OpenTelemetry's RPC and
GenAI conventions; prompts and completions are never recorded.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from engine.client.generation import End

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
Attribute = str | int | float | bool | list[str]
_FLUSH_S = 3.0


class ServerSpan:
    """The span of one RPC; does nothing where telemetry is off."""

    def __init__(self, telemetry: "Telemetry", span: "Span | None") -> None:
        self._telemetry = telemetry
        self._span = span

    def set(self, attributes: Mapping[str, Attribute]) -> None:
        """Adds attributes."""
        if self._span is not None:
            self._span.set_attributes(dict(attributes))

    def phases(self, end: "End") -> None:
        """Children tokenize, queue, prefill and decode of an ended generation."""
        if self._span is None:
            return
        # Unix time at monotonic time 0, taken now: the wall clock may have been set meanwhile.
        epoch_ns = time.time_ns() - time.monotonic_ns()
        edges = (end.arrival, end.tokenized, end.scheduled, end.first_token, end.finished)
        names = ("tokenize", "queue", "prefill", "decode")
        for name, (begin, stop) in zip(names, pairwise(edges), strict=True):
            if begin is not None:
                last = end.finished if stop is None else stop
                times = (epoch_ns + int(1e9 * begin), epoch_ns + int(1e9 * last))
                self._telemetry.child(self._span, name, *times)

    def end(self, code: grpc.StatusCode) -> None:
        """Closes the span; every code but OK is an error, as the RPC conventions say."""
        if self._span is None:
            return
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("rpc.response.status_code", code.name)
        if code is not grpc.StatusCode.OK:
            self._span.set_attribute("error.type", code.name)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class Telemetry:
    """Makes spans with ``provider``; None switches everything off."""

    def __init__(self, provider: "TracerProvider | None") -> None:
        self._provider = provider
        self._tracer = None if provider is None else provider.get_tracer("venturi")

    @classmethod
    def from_environment(cls, attributes: Mapping[str, str]) -> "Telemetry":
        """Exports by OTLP/gRPC where an endpoint is set."""
        if not any(os.environ.get(name) for name in ENDPOINTS):
            return cls(None)
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create({"service.name": "venturi", **attributes})
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    def server_span(self, method: str, metadata: Mapping[str, Any], request_id: str) -> ServerSpan:
        """The span of an RPC, child of the caller's ``traceparent`` where there is one."""
        if self._tracer is None:
            return ServerSpan(self, None)
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(metadata)
        attributes = {
            "rpc.system.name": "grpc",
            "rpc.method": method,
            "venturi.request.id": request_id,
        }
        span = self._tracer.start_span(
            method, context=parent, kind=SpanKind.SERVER, attributes=attributes
        )
        return ServerSpan(self, span)

    def root(self, name: str, begin_ns: int) -> "Span | None":
        """A root span of our own doing, such as a start-up; None where telemetry is off."""
        return None if self._tracer is None else self._tracer.start_span(name, start_time=begin_ns)

    def child(
        self,
        parent: "Span | None",
        name: str,
        begin_ns: int,
        end_ns: int,
        attributes: Mapping[str, str | int] | None = None,
    ) -> "Span | None":
        """A finished child of ``parent``."""
        if self._tracer is None or parent is None:
            return None
        from opentelemetry.trace import set_span_in_context

        span = self._tracer.start_span(
            name,
            context=set_span_in_context(parent),
            start_time=begin_ns,
            attributes=dict(attributes or {}),
        )
        span.end(max(begin_ns, end_ns))
        return span

    def shutdown(self) -> None:
        """Sends what is left."""
        if self._provider is not None:
            send_rest(self._provider.shutdown)


def send_rest(shutdown: Callable[[], object]) -> None:
    """Shuts a provider down, for at most three seconds: a receiver may be gone."""
    sending = threading.Thread(target=shutdown, daemon=True)
    sending.start()
    sending.join(_FLUSH_S)
