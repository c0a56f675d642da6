"""What a caller may say: the prompt and the keyword options of a request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeAlias, TypedDict

Seconds: TypeAlias = float | timedelta


class ChatMessage(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


Chat: TypeAlias = Sequence[ChatMessage] | Sequence[Mapping[str, str]]
Prompt: TypeAlias = str | Sequence[int] | Chat
"""Text, token ids, or the messages of a chat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptCompression:
    """How the server shortens the prompt before it runs the model.

    ``keep_ratio`` is the share of the prompt's tokens to keep, in (0, 1]; ``target_tokens`` is
    the alternative to it. ``protected_spans`` are half-open ranges of characters that stay.
    """

    mode: Literal["off", "on", "auto"] = "on"
    keep_ratio: float | None = None
    target_tokens: int | None = None
    method: str | None = None
    protected_spans: Sequence[tuple[int, int]] = ()
    question: str | None = None
    allow_code: bool | None = None
    strict: bool | None = None
    budget: Seconds | None = None


class GenerateOptions(TypedDict, total=False):
    """Keyword options of ``generate``. One that is absent or None is unset in the request.

    Times are seconds or a timedelta. ``timeout`` becomes the gRPC deadline of the call;
    ``max_duration`` ends the text early and keeps it. ``temperature`` 0 is greedy.
    The values are checked by the server, which answers with ``BadRequestError``.
    """

    model: str | None
    request_id: str | None
    timeout: float | None
    metadata: Mapping[str, str] | None
    # chat prompts only
    add_generation_prompt: bool | None
    template_kwargs: Mapping[str, object] | None
    # sampling
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    n: int | None
    logit_bias: Mapping[int, float] | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    # stopping
    max_tokens: int | None
    min_tokens: int | None
    max_duration: Seconds | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop: bool | None
    ignore_eos: bool | None
    # structured output: at most one of these
    json_schema: str | Mapping[str, object] | None
    regex: str | None
    grammar: str | None
    choice: Sequence[str] | None
    # output
    logprobs: int | None
    prompt_logprobs: int | None
    return_token_ids: bool | None
    echo: bool | None
    # scheduling, prompt compression and cache
    priority: int | None
    queue_timeout: Seconds | None
    prompt_compression: PromptCompression | None
    salt: str | None
    bypass_prefix_cache: bool | None


class StreamOptions(GenerateOptions, total=False):
    """Keyword options of ``stream``: those of ``generate`` and how tokens share a message."""

    max_tokens_per_message: int | None
    max_delay: Seconds | None
