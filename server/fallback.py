"""Watches over the served variant, and puts the original in its place where that is asked for."""

from collections.abc import Callable

from engine.client.engine_client import EngineClient
from engine.client.transport import Transport
from server.config import ServerConfig
from server.monitoring import Alarm, AlarmLimits, EntropyReference, Watch
from server.provenance import Provenance
from server.serving import Fallback, Serving

ORIGINAL = "original"


def watch_over(
    config: ServerConfig,
    serving: Serving,
    engine: EngineClient,
    make_original: Callable[[], Transport],
) -> None:
    """Has what ``engine`` tells of its inside averaged and judged.

    ``make_original`` starts an engine of the original, for ``--fallback``.
    """
    reference = serving.provenance.entropy()

    def fall_back(alarm: Alarm, line: str) -> None:
        asked = config.fallback == "alarm" or alarm is Alarm.NON_FINITE
        # A service that drains is about to end, and its requests had better do so by themselves.
        if not asked or not serving.ready:
            return
        why = f"falling back from {serving.variant} to the original: {line}"
        serving.fallback = Fallback(variant=serving.variant, reason=line)
        serving.variant, serving.gate = ORIGINAL, None
        serving.provenance = Provenance.from_folder(config.original_folder)
        _watch(config, serving, engine, reference)
        engine.replace(make_original, why)

    watch = _watch(config, serving, engine, reference)
    if config.fallback != "off":
        watch.on_alarm = fall_back


def _watch(
    config: ServerConfig,
    serving: Serving,
    engine: EngineClient,
    reference: EntropyReference | None,
) -> Watch:
    limits = AlarmLimits(entropy_nats=config.alarm_entropy, non_finite=config.alarm_non_finite)
    serving.watch = Watch(limits, reference, f"{serving.name}@{serving.variant}")
    engine.on_figures = serving.watch.take
    return serving.watch
