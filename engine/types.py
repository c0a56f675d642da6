"""Requests, sequences, batches and events: what the engine's parts say to each other.

Token ids in, token ids out: the core knows no text. Times are
seconds of ``time.monotonic``, which all processes of a host share.
"""

from dataclasses import dataclass, field
from enum import Enum

from engine.figures import StepFigures
from engine.ngram import Drafter


class FinishReason(Enum):
    """Why a sequence ended. The last six carry no result.

    ``REFUSED``: its time in the queue is over, or its deadline cannot be met; ``INVALID``: its
    constraint cannot be compiled; ``ERROR``: this request cannot be computed; ``LOST``: the
    engine died under it.
    """

    STOP = "stop"
    LENGTH = "length"
    EOS = "eos"
    TIME_LIMIT = "time_limit"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    REFUSED = "refused"
    INVALID = "invalid"
    ERROR = "error"
    LOST = "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. ``temperature`` 0 is greedy; ``top_k`` 0 is off.

    Penalties are those of the OpenAI API (presence, frequency: subtracted from the logits of
    generated tokens) and of CTRL (repetition: of prompt and generated tokens). ``logprobs`` is
    the number of alternatives to report with each token, None for no report at all;
    ``prompt_logprobs`` likewise for the prompt. ``constraint`` is what the output must match.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: "Constraint | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """``kind`` is ``json_schema``, ``regex``, ``grammar`` (Lark) or ``choice`` (a JSON list)."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppingParams:
    """When a sequence ends. ``eos_token_ids`` is empty where the caller ignores them.

    Before ``min_tokens`` neither an end token nor a stop token is sampled.
    """

    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    time_limit: float | None = None
    deadline: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One accepted request. ``id`` is unique among the engine's live requests.

    ``choices`` sequences are generated from it. Higher ``priority`` is sooner. After
    ``queue_deadline`` it is refused unless it runs. Requests with different ``cache_salt``
    share no cached prefix.
    """

    id: str
    prompt: list[int]
    sampling: SamplingParams
    stopping: StoppingParams
    arrival: float
    choices: int = 1
    priority: int = 0
    queue_deadline: float | None = None
    cache_salt: str = ""


@dataclass(slots=True, eq=False)
class Sequence:
    """A choice of a request on its way. Owned by the scheduler; the block manager hands out
    the blocks of its table.

    ``tokens`` is the prompt and what was generated; KV of the first ``computed`` of them
    is in the blocks of ``block_table``; ``digests`` names the full ones, of which the first
    ``registered`` can be found by others. ``leader`` is the
    choice whose prompt it waits for, to share its blocks. Log-probabilities of the prompt are
    out up to its token ``reported``, which the runner counts.
    """

    request: Request
    tokens: list[int]
    choice: int = 0
    leader: "Sequence | None" = None
    computed: int = 0
    block_table: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    registered: int = 0
    cached: int = 0
    preemptions: int = 0
    recomputed: int = 0
    reported: int = 0
    prompt_done: bool = False
    scheduled_at: float | None = None
    first_token_at: float | None = None
    drafter: Drafter = field(default_factory=Drafter)

    @property
    def order(self) -> tuple[int, float, float, int]:
        """Sorts sequences: priority, then earliest deadline, then arrival, then choice."""
        deadline = self.request.stopping.deadline
        far = float("inf")
        arrival = self.request.arrival
        return -self.request.priority, far if deadline is None else deadline, arrival, self.choice

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

    def last_token(self, logprobs: "TokenLogprobs | None") -> "TokenEvent":
        """The event of the token generated last."""
        return TokenEvent(
            id=self.id,
            token=self.tokens[-1],
            choice=self.choice,
            cached=self.cached if self.generated == 1 else 0,
            logprobs=logprobs,
        )

    def end(
        self,
        reason: FinishReason,
        now: float,
        *,
        stop: int | None = None,
        message: str = "",
        retry_after_s: float = 1.0,
    ) -> "Finished":
        """The terminal event of this choice."""
        return Finished(
            id=self.id,
            reason=reason,
            choice=self.choice,
            cached=self.cached,
            recomputed=self.recomputed,
            retry_after_s=retry_after_s,
            scheduled_at=self.scheduled_at,
            first_token_at=self.first_token_at,
            finished_at=now,
            preemptions=self.preemptions,
            stop_token_id=stop,
            message=message,
        )


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """The next ``length`` uncomputed tokens of a sequence, run in this step.

    ``drafts`` run after them: guesses at the tokens to come, where the step samples.
    """

    sequence: Sequence
    length: int
    drafts: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Tokens of the batch that are this item's."""
        return self.length + len(self.drafts)

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
    """A token of a choice; ``logprobs`` where the request asks for them.

    The choice's first one says how many prompt tokens were ``cached``.
    """

    id: str
    token: int
    choice: int = 0
    cached: int = 0
    logprobs: "TokenLogprobs | None" = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms under the model's own distribution (before temperature and filters).

    ``rank`` counts from 1; ``top`` are (token, logprob) of the likeliest, best first.
    """

    token: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of a request's prompt, from its second token on; comes before its first token."""

    id: str
    tokens: list[TokenLogprobs]


@dataclass(slots=True)
class StepResult:
    """What a step computed. ``tokens[i]`` is item i's where that samples; it is negative where
    there is none (see ``endings.failure``). ``after_drafts[i]`` follow its drafts."""

    tokens: list[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompts: list[PromptLogprobs] = field(default_factory=list)
    after_drafts: dict[int, list[int]] = field(default_factory=dict)
    figures: StepFigures | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The terminal event: exactly one for each choice of an accepted request.

    ``scheduled_at`` and ``first_token_at`` are None where it never came so far. ``cached`` are
    prompt tokens whose KV was there already, ``recomputed`` those that preemption threw away.
    """

    id: str
    reason: FinishReason
    choice: int = 0
    cached: int = 0
    recomputed: int = 0
    retry_after_s: float = 1.0
    scheduled_at: float | None
    first_token_at: float | None
    finished_at: float
    preemptions: int = 0
    stop_token_id: int | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Events of one step, in their order for a choice; ``figures`` of what a monitor saw."""

    prompts: list[PromptLogprobs] = field(default_factory=list)
    tokens: list[TokenEvent] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    figures: StepFigures | None = None

    def __bool__(self) -> bool:
        return bool(self.prompts or self.tokens or self.finished or self.figures)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Live counts. Of speculation's ``drafted_tokens``, ``accepted_tokens`` were right."""

    queued: int
    running: int
    blocks_used: int
    blocks_free: int
    blocks_cached: int
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    cached_tokens: int
    recomputed_tokens: int
    drafted_tokens: int
    accepted_tokens: int


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
