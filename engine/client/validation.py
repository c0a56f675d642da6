"""Checks a request against the served model and fills in what it leaves open."""

import secrets
from dataclasses import dataclass

from engine.client.constraints import check_constraint
from engine.client.defaults import MAX_TEMPERATURE, REPETITION_PENALTIES, GenerationDefaults
from engine.client.requests import GenerationRequest
from engine.errors import InvalidRequest
from engine.types import ModelReport, SamplingParams, StoppingParams

MAX_STOPS = 16
MAX_CHOICES = 16
MAX_PRIORITY = 1000
MAX_STOP_CHARACTERS = 256
MAX_STOP_IDS = 128
MAX_SEED = (1 << 64) - 1
MAX_BIASES = 1024
MAX_BIAS = 100.0
MAX_PENALTY = 2.0
MAX_LOGPROBS = 20
# Of prompt tokens and alternatives together: they leave in one message.
MAX_PROMPT_LOGPROBS = 1 << 17


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the served model."""

    vocabulary_size: int
    max_sequence_tokens: int
    bound: str = "the model's context"  # whose tokens these are, for messages

    @classmethod
    def of(cls, report: ModelReport) -> "Limits":
        """From what the engine found in memory."""
        small = report.max_sequence_tokens < report.context_length
        bound = "the KV pool" if small else "the model's context"
        return cls(report.vocabulary_size, report.max_sequence_tokens, bound)


def check(request: GenerationRequest, limits: Limits) -> None:
    """Raises ``InvalidRequest`` for everything that can be told before tokenising."""
    _within("sampling.temperature", request.temperature, 0.0, MAX_TEMPERATURE)
    _within("sampling.top_p", request.top_p, 0.0, 1.0)
    if request.top_p == 0:
        raise InvalidRequest("sampling.top_p", "must be above 0")
    _within("sampling.top_k", request.top_k, 0, limits.vocabulary_size)
    _within("sampling.min_p", request.min_p, 0.0, 1.0)
    _within("sampling.seed", request.seed, 0, MAX_SEED)
    _check_penalties(request, limits)
    _within("output.logprobs", request.logprobs, 0, MAX_LOGPROBS)
    _within("output.prompt_logprobs", request.prompt_logprobs, 0, MAX_LOGPROBS)
    _within("stopping.max_tokens", request.max_tokens, 1, limits.max_sequence_tokens)
    _within("stopping.min_tokens", request.min_tokens, 0, limits.max_sequence_tokens)
    _within("stopping.max_duration", request.max_duration, 1e-3, 86400.0)
    _within("sampling.n", request.n, 1, MAX_CHOICES)
    _within("scheduling.priority", request.priority, -MAX_PRIORITY, MAX_PRIORITY)
    _within("scheduling.queue_timeout", request.queue_timeout, 1e-3, 86400.0)
    _check_stops(request, limits)
    if request.constraint is not None:
        check_constraint(request.constraint)
        if request.ignore_eos:
            message = "cannot be set with structured output, which ends with the end token"
            raise InvalidRequest("stopping.ignore_eos", message)
    if isinstance(request.prompt, list):
        check_ids("token_ids", request.prompt, limits)
        room_for(request, limits, len(request.prompt))


def _check_penalties(request: GenerationRequest, limits: Limits) -> None:
    _within("sampling.presence_penalty", request.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    _within("sampling.frequency_penalty", request.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    _within("sampling.repetition_penalty", request.repetition_penalty, *REPETITION_PENALTIES)
    if len(request.logit_bias) > MAX_BIASES:
        raise InvalidRequest("sampling.logit_bias", f"at most {MAX_BIASES} ids")
    check_ids("sampling.logit_bias", [token for token, _ in request.logit_bias], limits)
    for _, bias in request.logit_bias:
        _within("sampling.logit_bias", bias, -MAX_BIAS, MAX_BIAS)


def _check_stops(request: GenerationRequest, limits: Limits) -> None:
    stops = request.stop or ()
    if len(stops) > MAX_STOPS:
        raise InvalidRequest("stopping.stop", f"at most {MAX_STOPS} stop strings")
    if any(not 1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise InvalidRequest(
            "stopping.stop", f"each must have 1 to {MAX_STOP_CHARACTERS} characters"
        )
    if len(request.stop_token_ids) > MAX_STOP_IDS:
        raise InvalidRequest("stopping.stop_token_ids", f"at most {MAX_STOP_IDS} ids")
    check_ids("stopping.stop_token_ids", request.stop_token_ids, limits)


def _within(field: str, value: float | None, low: float, high: float) -> None:
    # A NaN is not within anything.
    if value is not None and not low <= value <= high:
        raise InvalidRequest(field, f"must be from {low} to {high}, not {value}")


def check_ids(field: str, ids: list[int] | tuple[int, ...], limits: Limits) -> None:
    """Raises ``InvalidRequest`` for ids outside of the vocabulary."""
    if ids and (min(ids) < 0 or max(ids) >= limits.vocabulary_size):
        raise InvalidRequest(field, f"ids must be from 0 to {limits.vocabulary_size - 1}")


def sampling_params(request: GenerationRequest, defaults: GenerationDefaults) -> SamplingParams:
    """A request without a seed gets a random one."""
    penalty = request.repetition_penalty
    return SamplingParams(
        temperature=defaults.temperature if request.temperature is None else request.temperature,
        top_p=defaults.top_p if request.top_p is None else request.top_p,
        top_k=defaults.top_k if request.top_k is None else request.top_k,
        min_p=defaults.min_p if request.min_p is None else request.min_p,
        seed=secrets.randbits(64) if request.seed is None else request.seed,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=defaults.repetition_penalty if penalty is None else penalty,
        logit_bias=request.logit_bias,
        logprobs=request.logprobs,
        prompt_logprobs=request.prompt_logprobs,
        constraint=request.constraint,
    )


def room_for(request: GenerationRequest, limits: Limits, prompt_tokens: int) -> int:
    """Tokens that fit behind the prompt. Raises ``InvalidRequest`` if it and max_tokens do not."""
    room = limits.max_sequence_tokens - prompt_tokens
    if prompt_tokens < 1:
        raise InvalidRequest("input", "the prompt is empty")
    if room < (request.max_tokens or 1):
        wanted = f" and {request.max_tokens} new ones" if request.max_tokens else ""
        raise InvalidRequest(
            "stopping.max_tokens" if request.max_tokens else "input",
            f"{prompt_tokens} prompt tokens{wanted} do not fit into the "
            f"{limits.max_sequence_tokens} tokens of {limits.bound}",
        )
    return room


def stopping_params(
    request: GenerationRequest,
    defaults: GenerationDefaults,
    limits: Limits,
    prompt_tokens: int,
    arrival: float,
) -> StoppingParams:
    """Raises ``InvalidRequest`` for what depends on the prompt's length or the model's ends:
    what ``room_for`` refuses, or a constraint without an end token."""
    room = room_for(request, limits, prompt_tokens)
    max_tokens = request.max_tokens or room
    if request.min_tokens > max_tokens:
        message = f"{request.min_tokens} is more than the {max_tokens} tokens that may come"
        raise InvalidRequest("stopping.min_tokens", message)
    alternatives = request.prompt_logprobs
    if alternatives is not None and prompt_tokens * (alternatives + 1) > MAX_PROMPT_LOGPROBS:
        message = f"prompt tokens x alternatives are more than {MAX_PROMPT_LOGPROBS}"
        raise InvalidRequest("output.prompt_logprobs", message)
    if request.constraint is not None and not defaults.eos_token_ids:
        raise InvalidRequest("structured", "this model has no end token, which it needs")
    limit = request.max_duration
    return StoppingParams(
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        stop_token_ids=request.stop_token_ids,
        eos_token_ids=() if request.ignore_eos else defaults.eos_token_ids,
        time_limit=None if limit is None else arrival + limit,
        deadline=request.deadline,
    )
