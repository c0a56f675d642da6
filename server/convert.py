"""The only file that knows both vocabularies: the contract's messages and the engine's types."""

import json
from dataclasses import replace
from typing import Any

from google.protobuf import duration_pb2

from engine.client.constraints import choice_constraint
from engine.client.generation import Delta, End, Generation
from engine.client.requests import Chat, GenerationRequest
from engine.client.stream import Coalescing
from engine.errors import InvalidRequest
from engine.types import Constraint, FinishReason, ModelReport, TokenLogprobs
from server.monitoring import Watch
from server.telemetry import Attribute
from server.unserved import refuse_unserved
from venturi.v1 import inference_pb2 as pb
from venturi.v1 import model_pb2

AnyGenerateRequest = pb.GenerateRequest | pb.GenerateStreamRequest

REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.EOS: pb.FINISH_REASON_EOS,
    FinishReason.TIME_LIMIT: pb.FINISH_REASON_TIME_LIMIT,
}
_MAX_DELAY_S = 10.0


def generation_request(
    request: AnyGenerateRequest, request_id: str, deadline: float | None
) -> GenerationRequest:
    """Raises ``NotServed`` or ``InvalidRequest`` with the field's path."""
    refuse_unserved(request)
    sampling, stopping, output = request.sampling, request.stopping, request.output
    return GenerationRequest(
        id=request_id,
        prompt=_prompt(request),
        temperature=_optional(sampling, "temperature"),
        top_p=_optional(sampling, "top_p"),
        top_k=_optional(sampling, "top_k"),
        min_p=_optional(sampling, "min_p"),
        seed=_optional(sampling, "seed"),
        n=sampling.n if sampling.HasField("n") else 1,
        logit_bias=tuple(sorted(sampling.logit_bias.items())),
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=_optional(sampling, "repetition_penalty"),
        constraint=_constraint(request.structured),
        logprobs=_optional(output, "logprobs"),
        prompt_logprobs=_optional(output, "prompt_logprobs"),
        echo=output.echo,
        max_tokens=_optional(stopping, "max_tokens"),
        min_tokens=stopping.min_tokens,
        max_duration=_seconds(stopping, "max_duration"),
        stop=tuple(stopping.stop) or None,
        stop_token_ids=tuple(stopping.stop_token_ids),
        include_stop=stopping.include_stop,
        ignore_eos=stopping.ignore_eos,
        deadline=deadline,
        priority=request.scheduling.priority,
        queue_timeout=_seconds(request.scheduling, "queue_timeout"),
        cache_salt=request.cache.salt,
        bypass_cache=request.cache.bypass_prefix_cache,
        coalescing=_coalescing(request),
    )


def chat_or_text(request: pb.TokenizeRequest) -> str | Chat:
    """The input of a ``Tokenize``."""
    match request.WhichOneof("input"):
        case "text":
            return request.text
        case "chat":
            return _chat(request.chat)
    raise InvalidRequest("input", "set text or chat")


def prompt_info(
    generation: Generation, delta: Delta, request_id: str, name: str, variant: str
) -> pb.PromptInfo:
    """What leaves with the first token, which is in ``delta``."""
    return pb.PromptInfo(
        request_id=request_id,
        model=name,
        variant=variant,
        prompt_tokens=generation.prompt_tokens,
        cached_tokens=delta.tokens[0].cached if delta.tokens else 0,
        prompt_logprobs=[_logprobs(each) for each in generation.prompt_logprobs],
    )


def chunk(delta: Delta, with_ids: bool) -> pb.Chunk:
    """Text, ids and log-probabilities of one message."""
    return pb.Chunk(
        index=delta.choice,
        text_delta=delta.text,
        token_ids=delta.token_ids if with_ids else (),
        logprobs=[_logprobs(event.logprobs) for event in delta.tokens if event.logprobs],
    )


def _logprobs(token: TokenLogprobs) -> pb.TokenLogprobs:
    top = [pb.TokenLogprob(token_id=each, logprob=logprob) for each, logprob in token.top]
    return pb.TokenLogprobs(token_id=token.token, logprob=token.logprob, rank=token.rank, top=top)


def finish(end: End, choice: int) -> pb.ChoiceFinish:
    """Why the choice ended."""
    message = pb.ChoiceFinish(index=choice, reason=REASONS[end.reason])
    if end.stop is not None:
        message.stop = end.stop
    elif end.stop_token_id is not None:
        message.stop_token_id = end.stop_token_id
    return message


def summary(ends: list[End], prompt_tokens: int) -> pb.Summary:
    """Usage of all choices; timings of the first choice, but decoding ends with the last."""
    usage = pb.Usage(
        prompt_tokens=prompt_tokens,
        cached_tokens=ends[0].cached_tokens,
        completion_tokens=sum(end.completion_tokens for end in ends),
        preemptions=sum(end.preemptions for end in ends),
    )
    return pb.Summary(usage=usage, timings=_timings(overall(ends)))


def overall(ends: list[End]) -> End:
    """One end for all: the first choice's, with the counts of all and the last one's time."""
    return replace(
        ends[0],
        completion_tokens=sum(end.completion_tokens for end in ends),
        preemptions=sum(end.preemptions for end in ends),
        recomputed_tokens=sum(end.recomputed_tokens for end in ends),
        finished=max(end.finished for end in ends),
    )


def _timings(end: End) -> pb.Timings:
    """A phase that never began has no time."""
    timings = pb.Timings(tokenize=duration(end.tokenized - end.arrival))
    if end.scheduled is not None:
        timings.queue.CopyFrom(duration(end.scheduled - end.tokenized))
    if end.scheduled is not None and end.first_token is not None:
        timings.prefill.CopyFrom(duration(end.first_token - end.scheduled))
        timings.decode.CopyFrom(duration(end.finished - end.first_token))
        timings.ttft.CopyFrom(duration(end.first_token - end.arrival))
        if end.completion_tokens > 1:
            per_token = (end.finished - end.first_token) / (end.completion_tokens - 1)
            timings.tpot.CopyFrom(duration(per_token))
    return timings


def span_attributes(request: GenerationRequest, name: str) -> dict[str, Attribute]:
    """A request in OpenTelemetry's GenAI terms, without its text."""
    attributes: dict[str, Attribute] = {
        "gen_ai.operation.name": "chat" if isinstance(request.prompt, Chat) else "text_completion",
        "gen_ai.provider.name": "venturi",
        "gen_ai.request.model": name,
    }
    for key in ("max_tokens", "temperature", "top_p", "top_k", "seed"):
        value = getattr(request, key)
        if value is not None:
            # OTLP integers are signed 64 bit, a seed is not.
            attributes[f"gen_ai.request.{key}"] = str(value) if key == "seed" else value
    return attributes


def end_attributes(end: End, prompt_tokens: int, variant: str) -> dict[str, Attribute]:
    """A result in OpenTelemetry's GenAI terms."""
    return {
        "gen_ai.response.model": variant,
        "gen_ai.response.finish_reasons": [end.reason.value],
        "gen_ai.usage.input_tokens": prompt_tokens,
        "gen_ai.usage.output_tokens": end.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": end.cached_tokens,
        "venturi.preemptions": end.preemptions,
        "venturi.recomputed_tokens": end.recomputed_tokens,
    }


def duration(seconds: float) -> duration_pb2.Duration:
    """Never negative: clocks are read in two processes."""
    message = duration_pb2.Duration()
    message.FromNanoseconds(max(0, int(seconds * 1e9)))
    return message


def seconds(message: duration_pb2.Duration) -> float:
    """Inverse of ``duration`` for whatever a client may send."""
    return float(message.seconds + message.nanos / 1e9)


def model(report: ModelReport) -> model_pb2.Model:
    """What the engine found in memory."""
    return model_pb2.Model(
        architecture=report.architecture,
        context_length=report.context_length,
        vocabulary_size=report.vocabulary_size,
        parameters=report.parameters,
        precision=model_pb2.Precision(
            weights=report.weights,
            activations=report.activations,
            head=report.head,
            weight_bytes=report.weight_bytes,
            kernels=report.kernels,
        ),
        kv_cache=model_pb2.KvCache(
            dtype=report.kv_dtype,
            block_size=report.kv_block_size,
            blocks=report.kv_blocks,
            bytes=report.kv_bytes,
        ),
        layers=[
            model_pb2.LayerSummary(
                name=layer.name, storage=layer.storage, execution=layer.execution, bytes=layer.bytes
            )
            for layer in report.layers
        ],
    )


def monitoring(watch: Watch) -> model_pb2.Monitoring:
    """What the monitor saw of the served variant."""
    reference = watch.reference
    return model_pb2.Monitoring(
        sampled_steps=watch.sampled_steps,
        non_finite_logits=watch.non_finite_logits,
        entropy_nats=watch.entropy,
        reference_entropy_nats=None if reference is None else reference.mean,
        entropy_shift_nats=watch.entropy_shift,
        layers=[
            model_pb2.LayerActivity(
                zeroed_share=layer.zeroed.value,
                saturated_share=layer.saturated.value,
                outlier_ratio=layer.outlier.value,
                non_finite=layer.non_finite,
                kv_non_finite=layer.kv_non_finite,
            )
            for layer in watch.layers
        ],
        alarms=[
            model_pb2.Alarm(kind=alarm.value, text=text) for alarm, text in watch.alarms.items()
        ],
    )


def _prompt(request: AnyGenerateRequest) -> str | list[int] | Chat:
    match request.WhichOneof("input"):
        case "text":
            return request.text
        case "token_ids":
            return list(request.token_ids.ids)
        case "chat":
            return _chat(request.chat)
    raise InvalidRequest("input", "set text, token_ids or chat")


def _chat(chat: pb.Chat) -> Chat:
    if not chat.messages:
        raise InvalidRequest("chat.messages", "must not be empty")
    try:
        extra: Any = json.loads(chat.template_kwargs) if chat.template_kwargs else {}
    except (ValueError, RecursionError):
        extra = None
    if not isinstance(extra, dict):
        raise InvalidRequest("chat.template_kwargs", "must be a JSON object")
    added = _optional(chat, "add_generation_prompt")
    return Chat(
        messages=[{"role": m.role, "content": m.content} for m in chat.messages],
        add_generation_prompt=True if added is None else added,
        template_kwargs=extra,
    )


def _constraint(structured: pb.Structured) -> Constraint | None:
    kind = structured.WhichOneof("constraint")
    if kind is None:
        return None
    if kind == "choice":
        return choice_constraint(list(structured.choice.values))
    return Constraint(kind=kind, text=getattr(structured, kind))


def _coalescing(request: AnyGenerateRequest) -> Coalescing:
    if isinstance(request, pb.GenerateRequest):
        return Coalescing()
    most = _optional(request.stream, "max_tokens_per_message")
    if most is not None and most < 1:
        raise InvalidRequest("stream.max_tokens_per_message", "must be at least 1")
    delay = _seconds(request.stream, "max_delay")
    if delay is not None and not 0 <= delay <= _MAX_DELAY_S:
        raise InvalidRequest("stream.max_delay", f"must be from 0 to {_MAX_DELAY_S} s")
    return Coalescing(max_tokens=most or Coalescing().max_tokens, max_delay=delay)


def _optional(message: Any, field: str) -> Any:
    return getattr(message, field) if message.HasField(field) else None


def _seconds(message: Any, field: str) -> float | None:
    return seconds(getattr(message, field)) if message.HasField(field) else None
