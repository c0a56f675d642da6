"""The start-up order: compress, load, serve. The port is open before all of it."""

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from engine.client.admission import Admission
from engine.client.defaults import GenerationDefaults
from engine.client.engine_client import EngineClient
from engine.client.generation import Generator
from engine.client.process import ProcessTransport
from engine.client.tokenizer import Tokenizer
from engine.config import (
    CacheConfig,
    EngineConfig,
    KernelConfig,
    MonitorConfig,
    SchedulerConfig,
)
from engine.messages import Loading
from server.compressor import Compression, CompressionFailed, Wanted, compress
from server.config import ServerConfig, made_by
from server.fallback import check_original, watch_over
from server.provenance import Provenance
from server.quality import Refused
from server.serving import Progress, Serving
from server.telemetry import Telemetry
from venturi.v1 import admin_pb2 as pb

if TYPE_CHECKING:
    from opentelemetry.trace import Span

logger = logging.getLogger(__name__)


async def start_up(config: ServerConfig, serving: Serving, telemetry: Telemetry) -> None:
    """Leads ``serving`` to ready.

    Raises ``Refused``, ``CompressionFailed``, ``ModelLoadError`` or ``OSError``; the engine that
    was started is in ``serving.engine`` then, for the caller to stop.
    """
    begin = time.time_ns()
    root = telemetry.root("venturi.startup", begin)
    try:
        folder = await _artefact(config, serving, telemetry, root)
        loading = time.time_ns()
        # What is cheap to find wrong is looked at before the weights are loaded.
        tokenizer = Tokenizer.from_folder(folder)
        defaults = GenerationDefaults.from_folder(folder)
        serving.provenance = Provenance.from_folder(folder)
        serving.provenance.check_sizes(folder)
        if config.fallback != "off":
            check_original(config.original_folder, folder)
        serving.report(Progress(phase=pb.PHASE_LOADING))
        serving.engine = engine = EngineClient(
            lambda: ProcessTransport(engine_config(config, folder)), config.engine_timeout
        )
        engine.on_loading = lambda message: serving.report(_loading(message))
        original = engine_config(config, config.original_folder)
        watch_over(config, serving, engine, lambda: ProcessTransport(original))
        await engine.start()
        telemetry.child(root, "load", loading, time.time_ns())
        admission = Admission(config.max_requests, config.max_queued_tokens)
        serving.open(Generator(engine, tokenizer, defaults, admission))
    finally:
        if root is not None:
            root.end()


def engine_config(config: ServerConfig, folder: Path) -> EngineConfig:
    """The engine's part of the configuration."""
    return EngineConfig(
        model_dir=folder,
        cache=CacheConfig(
            dtype=config.kv_dtype, blocks=config.kv_blocks, memory_bytes=config.kv_memory
        ),
        scheduler=SchedulerConfig(
            max_sequences=config.max_sequences,
            token_budget=config.token_budget,
            speculative_tokens=config.speculative_tokens,
        ),
        kernels=KernelConfig(threads=config.threads, allow_slow=config.allow_slow),
        monitor=MonitorConfig(every_steps=config.monitor_steps, gap_s=config.monitor_gap),
        log_level=config.log_level,
    )


async def _artefact(
    config: ServerConfig, serving: Serving, telemetry: Telemetry, root: "Span | None"
) -> Path:
    if config.serves_as_it_is and not _wants_judging(config):
        if config.fallback != "off" and config.original is None:
            raise CompressionFailed(
                f"--fallback {config.fallback} needs the original, and {config.model} is served as "
                "it is: name the original's folder with --original"
            )
        outcome, line = Provenance.from_folder(config.model).verdict()
        if outcome not in ("", "pass"):
            logger.warning("served although the gate said when it was made: %s", line)
        return config.model
    if config.original is not None and not config.serves_as_it_is:
        raise CompressionFailed(
            f"--original goes with a compressed folder, and {config.model} is compressed now: "
            "leave --original out"
        )
    # What compressing would carry along broken is looked at before the work.
    if config.model.is_dir():
        Tokenizer.from_folder(config.model)
    begin = time.time_ns()
    serving.report(Progress(phase=pb.PHASE_COMPRESSING))
    wanted = Wanted(
        model=config.model,
        original=config.original,
        recipe=config.recipe,
        scale=config.scale,
        cache_dir=config.cache_dir,
        gate=config.gate,
        kv_dtype=config.kv_dtype,
        allow_slow=config.allow_slow,
    )
    result = await compress(wanted, serving.report)
    cached = {"venturi.cached": "yes" if result.cached else "no"}
    span = telemetry.child(root, "compress", begin, time.time_ns(), cached)
    for name, phase_begin, phase_end in result.phases:
        telemetry.child(span, f"compress.{name}", phase_begin, phase_end)
    _judge(result, serving)
    return result.artefact


def _wants_judging(config: ServerConfig) -> bool:
    """Whether a gate is asked for. Raises ``CompressionFailed`` where it has no original."""
    if config.gate not in ("warn", "enforce"):
        return False
    if made_by(config.model) is None:
        raise CompressionFailed(
            f"--gate {config.gate} judges what compressing costs, and {config.model} is served as "
            "it is: leave --gate out, or name a --recipe"
        )
    if config.original is None:
        raise CompressionFailed(
            f"--gate {config.gate} needs the original of {config.model}, which is compressed "
            "already: name its folder with --original"
        )
    return True


def _judge(result: Compression, serving: Serving) -> None:
    """Takes the verdict in. Raises ``Refused``."""
    serving.gate, serving.variant = result.gate, result.recipe or serving.variant
    gate = result.gate
    if gate is None:
        return
    if gate.refused:
        serving.provenance = Provenance.from_folder(result.artefact)
        raise Refused(f"refused by the gate: {gate.line}")
    if gate.passed:
        logger.info("the gate: %s", gate.line)
    else:
        logger.warning("served although the gate says: %s", gate.line)


def _loading(message: Loading) -> Progress:
    return Progress(phase=pb.PHASE_LOADING, item=message.item, items=message.items)
