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
from engine.config import CacheConfig, EngineConfig, KernelConfig, SchedulerConfig
from engine.messages import Loading
from server.compressor import compress
from server.config import ServerConfig
from server.provenance import Provenance
from server.serving import Progress, Serving
from server.telemetry import Telemetry
from venturi.v1 import admin_pb2 as pb

if TYPE_CHECKING:
    from opentelemetry.trace import Span

logger = logging.getLogger(__name__)


async def start_up(config: ServerConfig, serving: Serving, telemetry: Telemetry) -> None:
    """Leads ``serving`` to ready.

    Raises ``CompressionFailed``, ``ModelLoadError`` or ``OSError``; the engine that was
    started is in ``serving.engine`` then, for the caller to stop.
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
        serving.report(Progress(phase=pb.PHASE_LOADING))
        serving.engine = engine = EngineClient(
            lambda: ProcessTransport(engine_config(config, folder))
        )
        engine.on_loading = lambda message: serving.report(_loading(message))
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
        log_level=config.log_level,
    )


async def _artefact(
    config: ServerConfig, serving: Serving, telemetry: Telemetry, root: "Span | None"
) -> Path:
    if config.serves_as_it_is:
        return config.model
    # What compressing would carry along broken is looked at before the work.
    if config.model.is_dir():
        Tokenizer.from_folder(config.model)
    begin = time.time_ns()
    serving.report(Progress(phase=pb.PHASE_COMPRESSING))
    result = await compress(
        config.model,
        config.recipe,
        config.cache_dir,
        serving.report,
        allow_slow=config.allow_slow,
    )
    cached = {"venturi.cached": "yes" if result.cached else "no"}
    span = telemetry.child(root, "compress", begin, time.time_ns(), cached)
    for name, phase_begin, phase_end in result.phases:
        telemetry.child(span, f"compress.{name}", phase_begin, phase_end)
    return result.artefact


def _loading(message: Loading) -> Progress:
    return Progress(phase=pb.PHASE_LOADING, item=message.item, items=message.items)
