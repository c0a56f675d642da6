"""What the service answers, as frozen dataclasses.

Fields have the names of the messages in ``proto/venturi/v1``; a name that ends in ``_s`` is a
duration in seconds. None stands for what the server did not report.
"""

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a choice ended."""

    UNSPECIFIED = "unspecified"
    STOP = "stop"
    LENGTH = "length"
    EOS = "eos"
    TIME_LIMIT = "time_limit"


class Phase(StrEnum):
    """What the server is doing."""

    UNSPECIFIED = "unspecified"
    STARTING = "starting"
    COMPRESSING = "compressing"
    EVALUATING = "evaluating"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    RESTARTING = "restarting"
    DRAINING = "draining"
    UNRESPONSIVE = "unresponsive"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """An alternative to a sampled token."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token's log probability, its rank (1 is the most likely) and the alternatives."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """New text and tokens of the choice ``index``. The text may be empty."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished answer. ``matched_stop`` is the stop string or token id that ended it."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    matched_stop: str | int | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request, over all its choices."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a request went. ``tpot_s`` is per output token after the first."""

    queue_s: float | None = None
    tokenize_s: float | None = None
    prompt_compress_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class CompressionReport:
    """What prompt compression did, or why it did nothing."""

    original_tokens: int
    kept_tokens: int
    method: str
    skipped_reason: str
    elapsed_s: float | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """A complete response. The properties are those of the first choice."""

    request_id: str
    model: str
    variant: str
    choices: tuple[Choice, ...]
    usage: Usage
    timings: Timings
    compression: CompressionReport | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def text(self) -> str:
        """The generated text."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The generated tokens."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the text ended."""
        return self.choices[0].finish_reason

    @property
    def matched_stop(self) -> str | int | None:
        """The stop string or token id that ended the text, if one did."""
        return self.choices[0].matched_stop


@dataclass(frozen=True, slots=True)
class Tokenization:
    """Token ids, and the text that they stand for (a chat is rendered first)."""

    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Load:
    """The server's present load; the rate covers the last ten seconds."""

    queued: int
    running: int
    kv_blocks_used: int
    kv_blocks_free: int
    kv_blocks_cached: int
    tokens_per_second: float
    prompt_tokens_total: int
    completion_tokens_total: int
    preemptions_total: int
    engine_restarts_total: int


@dataclass(frozen=True, slots=True)
class StartupEvent:
    """A step of the server's start: ``item`` of ``items`` (0 where they are not counted)."""

    phase: Phase
    detail: str
    item: int
    items: int
    time_left_s: float | None = None


@dataclass(frozen=True, slots=True)
class Precision:
    """Types of the tensors in memory."""

    weights: str
    activations: str
    head: str
    weight_bytes: int
    kernels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KvCache:
    """The KV cache in memory; ``block_size`` is in tokens."""

    dtype: str
    block_size: int
    blocks: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where the weights came from."""

    recipe: str
    recipe_sha256: str
    weights_sha256: str
    format: str
    venturi_version: str
    artefact: str


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One layer: how it is stored and what its kernel computes."""

    name: str
    storage: str
    execution: str
    method: str
    bytes: int


@dataclass(frozen=True, slots=True)
class MeasuredQuality:
    """Quality against the original model; ``explanation`` is the gate's verdict in a sentence."""

    tokens: int
    data_sha256: str
    verdict: str
    explanation: str = ""
    restored_layers: tuple[str, ...] = ()
    mean_kl_nats: float | None = None
    perplexity: float | None = None
    original_perplexity: float | None = None


@dataclass(frozen=True, slots=True)
class MeasuredSpeed:
    """Tokens per second on the server's host; ``decode_8`` is with 8 requests at a time."""

    prefill: float | None = None
    decode_1: float | None = None
    decode_8: float | None = None
    decode_32: float | None = None


@dataclass(frozen=True, slots=True)
class LayerActivity:
    """What a decoder layer's linear layers read; shares are of the values that are rounded."""

    non_finite: int
    kv_non_finite: int
    zeroed_share: float | None = None
    saturated_share: float | None = None
    outlier_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Alarm:
    """A figure that has left its limits: ``kind`` is "non_finite" or "entropy"."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Monitoring:
    """What sampled steps showed of the running model: averages and counts; nats per token."""

    sampled_steps: int
    non_finite_logits: int
    layers: tuple[LayerActivity, ...]
    alarms: tuple[Alarm, ...]
    entropy_nats: float | None = None
    reference_entropy_nats: float | None = None
    entropy_shift_nats: float | None = None


@dataclass(frozen=True, slots=True)
class Fallback:
    """``variant`` was given up, and the original serves in its place."""

    variant: str
    reason: str


@dataclass(frozen=True, slots=True)
class Model:
    """A served model, as found in memory."""

    name: str
    variant: str
    architecture: str
    context_length: int
    vocabulary_size: int
    parameters: int
    has_chat_template: bool
    precision: Precision
    kv_cache: KvCache
    provenance: Provenance
    layers: tuple[LayerSummary, ...]
    eos_token_ids: tuple[int, ...]
    quality: MeasuredQuality | None = None
    speed: MeasuredSpeed | None = None
    monitoring: Monitoring | None = None
    fallback: Fallback | None = None
