"""What a caller asks of the front end, before it is checked against the served model."""

from dataclasses import dataclass, field
from typing import Any

from engine.client.stream import Coalescing
from engine.types import Constraint


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """Messages for the model's template; each has ``role`` and ``content``."""

    messages: list[dict[str, str]]
    add_generation_prompt: bool = True
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """None means: as the model's generation_config says, else the engine's default.

    ``deadline`` is a time of ``time.monotonic``; ``max_duration`` and ``queue_timeout``
    count from arrival, in seconds. ``logprobs`` and ``prompt_logprobs`` are numbers of
    alternatives; ``echo`` puts the prompt's text before each choice's.
    """

    id: str
    prompt: str | list[int] | Chat
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    n: int = 1
    logit_bias: tuple[tuple[int, float], ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    constraint: Constraint | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    max_duration: float | None = None
    stop: tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    deadline: float | None = None
    priority: int = 0
    queue_timeout: float | None = None
    cache_salt: str = ""
    bypass_cache: bool = False
    coalescing: Coalescing = field(default_factory=Coalescing)
