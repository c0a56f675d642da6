"""OpenTelemetry metrics: load, what the monitor sees, alarms.

Off, and free, unless OTEL_EXPORTER_OTLP_ENDPOINT (or its _METRICS_ form) is set. All are read when
they are exported, every OTEL_METRIC_EXPORT_INTERVAL milliseconds; a request pays nothing.
"""

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from engine.errors import EngineUnavailable
from server.monitoring import Alarm, LayerWatch, Watch
from server.serving import Serving
from server.telemetry import send_rest

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Observation
    from opentelemetry.sdk.metrics import MeterProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT")
# How long an export waits for an engine that is in a step; then the last counts are exported.
_STATS_S = 1.0

Value = int | float | None
# (value, its attributes); a value of None is not known and not exported.
Values = Iterator[tuple[Value, dict[str, str | int]]]


class Metrics:
    """Exports with ``provider``; None switches everything off."""

    def __init__(self, provider: "MeterProvider | None") -> None:
        self._provider = provider

    @classmethod
    def from_environment(cls, attributes: Mapping[str, str]) -> "Metrics":
        """Exports by OTLP/gRPC where an endpoint is set."""
        if not any(os.environ.get(name) for name in ENDPOINTS):
            return cls(None)
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource

        resource = Resource.create({"service.name": "venturi", **attributes})
        reader = PeriodicExportingMetricReader(OTLPMetricExporter())
        return cls(MeterProvider([reader], resource=resource, shutdown_on_exit=False))

    def observe(self, serving: Serving) -> None:
        """Exports ``serving`` from now on. Must be called in its event loop."""
        if self._provider is None:
            return
        meter = self._provider.get_meter("venturi")
        reader = _Reader(serving, asyncio.get_running_loop())
        makers = {
            "counter": meter.create_observable_counter,
            "updown": meter.create_observable_up_down_counter,
            "gauge": meter.create_observable_gauge,
        }
        for kind, name, unit, read, description in _INSTRUMENTS:
            make: Any = makers[kind]
            make(name, [reader.callback(read)], unit, description)

    def shutdown(self) -> None:
        """Sends what is left."""
        if self._provider is not None:
            send_rest(self._provider.shutdown)


class _Reader:
    """Reads a ``Serving`` in the exporter's thread."""

    def __init__(self, serving: Serving, loop: asyncio.AbstractEventLoop) -> None:
        self._serving = serving
        self._loop = loop

    def callback(
        self, read: Callable[[Serving], Values]
    ) -> "Callable[[CallbackOptions], list[Observation]]":
        """What an instrument calls: reads in the event loop, where nothing changes meanwhile."""
        from opentelemetry.metrics import Observation

        async def values() -> list[Observation]:
            serving = self._serving
            if serving.engine is not None and read in _OF_STATS:
                with suppress(EngineUnavailable, TimeoutError):
                    await asyncio.wait_for(serving.engine.stats(), _STATS_S)
            common = {"venturi.model": serving.name}
            if read not in _OF_PROCESS:
                common["venturi.variant"] = serving.variant
            return [
                Observation(value, {**common, **attributes})
                for value, attributes in read(serving)
                if value is not None
            ]

        def observe(options: "CallbackOptions") -> list[Observation]:
            future = asyncio.run_coroutine_threadsafe(values(), self._loop)
            try:
                return future.result(2 * _STATS_S)
            except TimeoutError:
                future.cancel()
                return []

        return observe


def _requests(serving: Serving) -> Values:
    if serving.engine is not None:
        stats = serving.engine.last_stats
        yield stats.running, {"state": "running"}
        yield stats.queued, {"state": "queued"}


def _blocks(serving: Serving) -> Values:
    if serving.engine is not None:
        stats = serving.engine.last_stats
        yield stats.blocks_used, {"state": "used"}
        yield stats.blocks_free, {"state": "free"}
        yield stats.blocks_cached, {"state": "cached"}


def _of_totals(name: str) -> Callable[[Serving], Values]:
    def read(serving: Serving) -> Values:
        if serving.engine is not None:
            yield getattr(serving.engine.totals, name), {}

    return read


_preemptions, _restarts = _of_totals("preemptions"), _of_totals("restarts")


def _tokens(serving: Serving) -> Values:
    if serving.engine is not None:
        yield serving.engine.totals.prompt_tokens, {"gen_ai.token.type": "input"}
        yield serving.engine.totals.completion_tokens, {"gen_ai.token.type": "output"}


def _of_watch(read: Callable[[Watch], Value]) -> Callable[[Serving], Values]:
    def values(serving: Serving) -> Values:
        if serving.watch is not None:
            yield read(serving.watch), {}

    return values


def _of_layers(read: Callable[[LayerWatch], Value]) -> Callable[[Serving], Values]:
    def values(serving: Serving) -> Values:
        layers = () if serving.watch is None else serving.watch.layers
        for index, layer in enumerate(layers):
            yield read(layer), {"venturi.layer": index}

    return values


def _alarms(serving: Serving) -> Values:
    if serving.watch is not None:
        for alarm in Alarm:
            yield int(alarm in serving.watch.alarms), {"venturi.alarm.kind": alarm.value}


def _fallback(serving: Serving) -> Values:
    yield int(serving.fallback is not None), {}


_OF_STATS = (_requests, _blocks)
# Counted since the process began, whichever variant served.
_OF_PROCESS = (_tokens, _preemptions, _restarts)
_INSTRUMENTS: tuple[tuple[str, str, str, Callable[[Serving], Values], str], ...] = (
    ("updown", "venturi.requests", "{request}", _requests, "Sequences by state."),
    ("updown", "venturi.kv_cache.blocks", "{block}", _blocks, "Blocks by state."),
    ("counter", "venturi.tokens", "{token}", _tokens, "Tokens of prompts and answers."),
    ("counter", "venturi.preemptions", "{preemption}", _preemptions,
     "Sequences that gave their blocks up."),
    ("counter", "venturi.engine.restarts", "{restart}", _restarts,
     "Engines started anew."),
    ("gauge", "venturi.activation.zeroed_share", "1", _of_layers(lambda x: x.zeroed.value),
     "Rounded activations that are not 0 and become 0."),
    ("gauge", "venturi.activation.saturated_share", "1", _of_layers(lambda x: x.saturated.value),
     "Rounded activations at the format's largest level."),
    ("gauge", "venturi.activation.outlier_ratio", "1", _of_layers(lambda x: x.outlier.value),
     "Largest absmax / rms of a token's activations."),
    ("counter", "venturi.activation.non_finite", "{value}", _of_layers(lambda x: x.non_finite),
     "NaN or infinite activations in sampled steps."),
    ("counter", "venturi.kv_cache.non_finite_scales", "{scale}",
     _of_layers(lambda x: x.kv_non_finite), "NaN or infinite KV scales in sampled steps."),
    ("counter", "venturi.logits.non_finite", "{row}", _of_watch(lambda w: w.non_finite_logits),
     "Rows of logits with NaN or infinity, in all steps."),
    ("gauge", "venturi.logits.entropy", "nat", _of_watch(lambda w: w.entropy),
     "Mean entropy of the next token's distribution."),
    ("gauge", "venturi.logits.entropy_shift", "nat", _of_watch(lambda w: w.entropy_shift),
     "From the original's on the text of its evaluation."),
    ("counter", "venturi.monitor.sampled_steps", "{step}", _of_watch(lambda w: w.sampled_steps),
     "Steps that were looked into."),
    ("gauge", "venturi.alarm", "1", _alarms,
     "1 while a figure is beyond its limits; once the original serves for that, venturi.fallback."),
    ("gauge", "venturi.fallback", "1", _fallback,
     "1 while the original serves in place of a variant that an alarm ended."),
)  # fmt: skip
