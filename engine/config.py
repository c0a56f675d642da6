"""The engine's configuration: one frozen dataclass for each part that owns it."""

import math
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """KV cache. ``blocks`` None sizes the pool from ``memory_bytes``; ``auto`` asks the model."""

    dtype: str = "auto"
    block_size: int = 16
    blocks: int | None = None
    memory_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if self.block_size < 1 or (self.blocks is not None and self.blocks < 1):
            raise ValueError("block_size and blocks must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Bounds of a step. ``token_budget`` counts the tokens of all its rows.

    Prompts take no more of a step than keeps it below ``max_gap_s`` (seconds, as measured)
    while others decode: it bounds the gap between two of their tokens. ``speculative_tokens``
    are drafted at most for a sequence and step; 0 is off.
    """

    max_sequences: int = 64
    token_budget: int = 512
    max_gap_s: float = 0.1
    speculative_tokens: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.max_sequences <= self.token_budget:
            raise ValueError("need 1 <= max_sequences <= token_budget")
        if not 0 < self.max_gap_s < math.inf:
            raise ValueError(f"max_gap_s must be positive and finite, not {self.max_gap_s}")
        if self.speculative_tokens < 0:
            raise ValueError("speculative_tokens must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelConfig:
    """Which implementation computes: ``cpu`` (native), ``torch``, or what is there of these.

    ``threads`` None chooses by the model's size. ``allow_slow``: also load what only a
    reference computes, which is for evaluation. ``int8_weights`` rounds floating matrices, but for
    routers, to int8 as they are loaded, a quarter of the memory and several times the speed: for
    text that need not be the very model's.
    """

    backend: str = "auto"
    threads: int | None = None
    allow_slow: bool = False
    int8_weights: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorConfig:
    """How often the inside of a step is looked at: one in ``every_steps`` (0: never), and at
    least ``gap_s`` seconds apart."""

    every_steps: int = 64
    gap_s: float = 0.5

    def __post_init__(self) -> None:
        if self.every_steps < 0 or not 0 <= self.gap_s < math.inf:
            raise ValueError("every_steps and gap_s must not be negative, and gap_s finite")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything that an engine needs besides requests."""

    model_dir: Path
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    log_level: str = "warning"
