"""Requests, sequences, batches and events: what the engine's parts say to each other.

Standard library only. Token ids in, token ids out: the core knows no text. Times are
seconds of ``time.monotonic``, which all processes of a host share.
"""

from dataclasses import dataclass, field
from enum import Enum


class FinishReason(Enum):
    """Why a sequence ended. The last four carry no result.

    ``ERROR``: this request cannot be computed; ``LOST``: the engine died under it.
    """

    STOP = "stop"
    LENGTH = "length"
    EOS = "eos"
    TIME_LIMIT = "time_limit"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"
    LOST = "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. ``temperature`` 0 is greedy; ``top_k`` 0 is off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppingParams:
    """When a sequence ends. ``eos_token_ids`` is empty where the caller ignores them."""

    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    time_limit: float | None = None
    deadline: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One accepted request. ``id`` is unique among the engine's live requests."""

    id: str
    prompt: list[int]
    sampling: SamplingParams
    stopping: StoppingParams
    arrival: float


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way. Owned by the scheduler; blocks belong to the block manager.

    ``tokens`` is the prompt and what was generated; KV of the first ``computed`` of them
    is in the blocks of ``block_table``.
    """

    request: Request
    tokens: list[int]
    computed: int = 0
    block_table: list[int] = field(default_factory=list)
    preemptions: int = 0
    scheduled_at: float | None = None
    first_token_at: float | None = None

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def generated(self) -> int:
        """Number of tokens after the prompt."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def uncomputed(self) -> int:
        """Tokens whose KV is not in the cache yet; 1 in a plain decode step."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """The next ``length`` uncomputed tokens of a sequence, run in this step."""

    sequence: Sequence
    length: int

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's last token, so that a new one follows."""
        return self.sequence.computed + self.length == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """The work of one step, in the order of its rows."""

    items: list[ScheduledSequence]

    def __bool__(self) -> bool:
        return bool(self.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """A token of a request."""

    id: str
    token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The terminal event: exactly one for each accepted request.

    ``scheduled_at`` and ``first_token_at`` are None where it never came so far.
    """

    id: str
    reason: FinishReason
    scheduled_at: float | None
    first_token_at: float | None
    finished_at: float
    preemptions: int = 0
    stop_token_id: int | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Events of one step; a request's token comes before its ``Finished``."""

    tokens: list[TokenEvent] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.tokens or self.finished)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Live counts of the core."""

    queued: int
    running: int
    blocks_used: int
    blocks_free: int
    prompt_tokens: int
    generated_tokens: int
    preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """A linear layer as found in memory, under its Hugging Face name."""

    name: str
    storage: str
    execution: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReport:
    """The loaded model, read from its tensors rather than from the request for it."""

    architecture: str
    context_length: int
    max_sequence_tokens: int
    vocabulary_size: int
    parameters: int
    weights: str
    activations: str
    head: str
    weight_bytes: int
    kernels: tuple[str, ...]
    format: str
    layers: tuple[LayerReport, ...]
    kv_dtype: str
    kv_block_size: int
    kv_blocks: int
    kv_bytes: int
