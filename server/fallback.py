"""Watches over the served variant, and puts the original in its place where that is asked for."""

from collections.abc import Callable
from pathlib import Path

from engine.client.engine_client import EngineClient
from engine.client.files import read_optional_json
from engine.client.transport import Transport
from engine.errors import ModelLoadError
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

    ``make_original`` starts an engine of the original, for ``--fallback``, whose folder is
    looked at now: an alarm is too late to find it broken. Raises ``ModelLoadError``.
    """
    reference = serving.provenance.entropy()
    if config.fallback == "off":
        _watch(config, serving, engine, reference)
        return
    original = Provenance.from_folder(config.original_folder)

    def fall_back(alarm: Alarm, line: str) -> None:
        asked = config.fallback == "alarm" or alarm is Alarm.NON_FINITE
        # A service that drains is about to end, and its requests had better do so by themselves.
        if not asked or not serving.ready:
            return
        why = f"falling back from {serving.variant} to the original: {line}"
        serving.fallback = Fallback(variant=serving.variant, reason=line)
        serving.variant, serving.gate = ORIGINAL, None
        serving.provenance = original
        _watch(config, serving, engine, reference)
        engine.replace(make_original, why)

    _watch(config, serving, engine, reference).on_alarm = fall_back


def check_original(original: Path, served: Path) -> None:
    """Raises ``ModelLoadError`` where ``original`` cannot stand in for ``served``.

    Only what is cheap is looked at: that there is a model, and that it has as many tokens, since
    requests go on being tokenised as for ``served``.
    """
    if not original.is_dir():
        raise ModelLoadError(f"the original to fall back to, {original}, is no folder")
    if next(original.glob("*.safetensors"), None) is None:
        raise ModelLoadError(f"the original to fall back to, {original}, has no weights")
    sizes = [_vocabulary_size(folder) for folder in (original, served)]
    if sizes[0] != sizes[1]:
        raise ModelLoadError(
            f"{original} has {sizes[0]} tokens, and {served} has {sizes[1]}: it is not its original"
        )


def _vocabulary_size(folder: Path) -> int:
    path = folder / "config.json"
    size = read_optional_json(path).get("vocab_size")
    if not isinstance(size, int):
        raise ModelLoadError(f"{path} is missing, or does not say a vocab_size")
    return size


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
