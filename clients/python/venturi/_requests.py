"""From what a caller says to the messages of the contract: one ``Call`` for each RPC."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from difflib import get_close_matches
from typing import Any, Generic, SupportsIndex, TypeVar, cast

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from venturi import _convert
from venturi._options import (
    Chat,
    GenerateOptions,
    Prompt,
    PromptCompression,
    Seconds,
    StreamOptions,
)
from venturi._types import Chunk, Generation, Load, Model, StartupEvent, Tokenization
from venturi.v1 import admin_pb2, model_pb2
from venturi.v1 import inference_pb2 as pb

T = TypeVar("T")
MessageT = TypeVar("MessageT", bound=Message)

# Options have the names of the fields in these parts of a request.
_SECTIONS = ("sampling", "stopping", "structured", "output", "scheduling", "cache", "stream")
_SECTION_OF = {
    option: section
    for section in _SECTIONS
    for option in getattr(pb.GenerateStreamRequest(), section).DESCRIPTOR.fields_by_name
}
_LONGEST_S = 1e9  # what a gRPC deadline holds
# Options of the call, or of a chat prompt.
_NOT_FIELDS = {"timeout", "metadata", "add_generation_prompt", "template_kwargs"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    """One RPC, ready to be sent by either client, and how its response messages read."""

    method: str
    request: Message
    convert: Callable[[Any], T]
    timeout: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    request_id: str = ""

    def __post_init__(self) -> None:
        check_timeout(self.timeout)


def generate(prompt: Prompt, options: GenerateOptions) -> Call[Generation]:
    """``InferenceService.Generate``."""
    _refuse_unknown("generate", options, GenerateOptions.__optional_keys__)
    request = _generate_request(pb.GenerateRequest, prompt, options)
    return _call("inference.Generate", request, options, _convert.generation)


def stream(
    prompt: Prompt,
    options: StreamOptions,
    convert: Callable[[pb.GenerateStreamResponse], Iterable[Chunk]],
) -> Call[Iterable[Chunk]]:
    """``InferenceService.GenerateStream``."""
    _refuse_unknown("stream", options, StreamOptions.__optional_keys__)
    request = _generate_request(pb.GenerateStreamRequest, prompt, options)
    return _call("inference.GenerateStream", request, options, convert)


def tokenize(
    prompt: str | Chat,
    model: str,
    add_special_tokens: bool | None,
    chat_options: Mapping[str, object],
    timeout: float | None,
) -> Call[Tokenization]:
    """``InferenceService.Tokenize``."""
    given = {name: value for name, value in chat_options.items() if value is not None}
    if isinstance(prompt, str):
        _refuse_chat_options(given)
    request = pb.TokenizeRequest(
        model=model,
        add_special_tokens=add_special_tokens,
        **({"text": prompt} if isinstance(prompt, str) else {"chat": _chat(prompt, given)}),
    )
    return Call(
        method="inference.Tokenize",
        request=request,
        convert=lambda message: _convert.from_proto(Tokenization, message),
        timeout=timeout,
    )


def detokenize(
    token_ids: Iterable[int], model: str, skip_special_tokens: bool | None, timeout: float | None
) -> Call[str]:
    """``InferenceService.Detokenize``."""
    request = pb.DetokenizeRequest(
        model=model, token_ids=token_ids, skip_special_tokens=skip_special_tokens
    )
    return Call(
        method="inference.Detokenize",
        request=request,
        convert=lambda message: str(message.text),
        timeout=timeout,
    )


def model(name: str, timeout: float | None) -> Call[Model]:
    """``ModelService.GetModel``."""
    return Call(
        method="model.GetModel",
        request=model_pb2.GetModelRequest(model=name),
        convert=lambda message: _convert.from_proto(Model, message.model),
        timeout=timeout,
    )


def tokenizer_files(
    model: str, timeout: float | None
) -> Call[Iterable[model_pb2.GetTokenizerResponse]]:
    """``ModelService.GetTokenizer``."""
    return Call(
        method="model.GetTokenizer",
        request=model_pb2.GetTokenizerRequest(model=model),
        convert=lambda message: [message],
        timeout=timeout,
    )


def models(timeout: float | None) -> Call[list[Model]]:
    """``ModelService.ListModels``."""
    return Call(
        method="model.ListModels",
        request=model_pb2.ListModelsRequest(),
        convert=lambda message: [_convert.from_proto(Model, each) for each in message.models],
        timeout=timeout,
    )


def health(service: str, timeout: float | None) -> Call[bool]:
    """``grpc.health.v1.Health.Check``."""
    return Call(
        method="health.Check",
        request=health_pb2.HealthCheckRequest(service=service),
        convert=lambda message: bool(message.status == health_pb2.HealthCheckResponse.SERVING),
        timeout=timeout,
    )


def load(timeout: float | None) -> Call[Load]:
    """``AdminService.GetLoad``."""
    return Call(
        method="admin.GetLoad",
        request=admin_pb2.GetLoadRequest(),
        convert=lambda message: _convert.from_proto(Load, message),
        timeout=timeout,
    )


def watch_startup(timeout: float | None) -> Call[Iterable[StartupEvent]]:
    """``AdminService.WatchStartup``."""
    return Call(
        method="admin.WatchStartup",
        request=admin_pb2.WatchStartupRequest(),
        convert=lambda message: [_convert.from_proto(StartupEvent, message)],
        timeout=timeout,
    )


def _call(
    method: str, request: Message, options: GenerateOptions, convert: Callable[[Any], T]
) -> Call[T]:
    return Call(
        method=method,
        request=request,
        convert=convert,
        timeout=options.get("timeout"),
        metadata=options.get("metadata") or {},
        request_id=options.get("request_id") or "",
    )


def _refuse_unknown(method: str, options: GenerateOptions, known: frozenset[str]) -> None:
    for name in options.keys() - known:
        near = get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"{method}() got an unexpected keyword argument {name!r}{hint}")


def _generate_request(cls: type[MessageT], prompt: Prompt, options: GenerateOptions) -> MessageT:
    given = {name: value for name, value in options.items() if value is not None}
    _refuse_both(given, ("json_schema", "regex", "grammar", "choice"))
    request = cls(**_input(prompt, given))
    for name, value in given.items():
        if name not in _NOT_FIELDS:
            _set(request, name, value)
    return request


def _set(request: Message, name: str, value: object) -> None:
    """Sets one option, so that a value of the wrong type or range is reported with its name."""
    try:
        fields = {name: _plain(name, value)}
        section = _SECTION_OF.get(name)
        request.MergeFrom(type(request)(**({section: fields} if section else fields)))
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _plain(name: str, value: Any) -> object:
    if name in ("max_duration", "queue_timeout", "max_delay"):
        return _duration(value)
    if name == "stop" and isinstance(value, str):
        return [value]
    if name == "choice":
        return {"values": value}
    if name == "json_schema" and not isinstance(value, str):
        return json.dumps(value)
    if name == "prompt_compression":
        return _compression(value)
    return value


def _duration(value: Seconds) -> timedelta:
    return value if isinstance(value, timedelta) else timedelta(seconds=value)


def check_timeout(timeout: object) -> None:
    """Raises ``TypeError`` or ``ValueError`` where no deadline can be made of it."""
    # gRPC takes NaN for no time at all and cannot hold infinity.
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise TypeError(f"timeout: give seconds or None, not {timeout!r}")
    if not 0 < timeout < _LONGEST_S:
        raise ValueError(f"timeout: give a positive number of seconds, not {timeout}")


def _input(prompt: Prompt, given: Mapping[str, object]) -> dict[str, object]:
    if isinstance(prompt, str):
        fields: dict[str, object] = {"text": prompt}
    elif not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        kind = type(prompt).__name__
        raise TypeError(f"prompt: give text, token ids or messages, not {kind}")
    elif not prompt:
        raise ValueError("The prompt is an empty list: give text, token ids or messages.")
    elif isinstance(prompt[0], Mapping):
        return {"chat": _chat(cast(Chat, prompt), given)}
    else:
        fields = {"token_ids": {"ids": _token_ids(prompt)}}
    _refuse_chat_options(given)
    return fields


def _refuse_chat_options(given: Mapping[str, object]) -> None:
    for name in ("add_generation_prompt", "template_kwargs"):
        if name in given:
            raise ValueError(f"{name} is for a prompt of messages")


def _token_ids(prompt: Sequence[object]) -> Sequence[object]:
    for index, token in enumerate(prompt):
        if isinstance(token, bool) or not isinstance(token, SupportsIndex):
            raise TypeError(f"prompt[{index}]: {token!r} is no token id")
        if not 0 <= token.__index__() < 1 << 32:
            raise ValueError(f"prompt[{index}]: {token!r} is no token id")
    return prompt


def _message(index: int, message: object) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise TypeError(f"prompt[{index}]: a message is a dict with role and content")
    for name in message.keys() ^ {"role", "content"}:
        problem = "is missing" if name not in message else "is not part of a message"
        raise ValueError(f"prompt[{index}]: {name!r} {problem}")
    for name, value in message.items():
        if not isinstance(value, str):
            raise TypeError(f"prompt[{index}][{name!r}]: give a string, not {value!r}")
    return dict(message)


def _chat(messages: Chat, given: Mapping[str, object]) -> dict[str, object]:
    kwargs = given.get("template_kwargs")
    return {
        "messages": [_message(index, message) for index, message in enumerate(messages)],
        "add_generation_prompt": given.get("add_generation_prompt"),
        "template_kwargs": None if kwargs is None else json.dumps(kwargs),
    }


def _compression(options: PromptCompression) -> dict[str, object]:
    given = {name: value for name, value in asdict(options).items() if value is not None}
    _refuse_both(given, ("keep_ratio", "target_tokens"))
    given["mode"] = f"MODE_{options.mode.upper()}"
    given["protected_spans"] = [{"start": a, "end": b} for a, b in options.protected_spans]
    if options.budget is not None:
        given["budget"] = _duration(options.budget)
    return given


def _refuse_both(given: Mapping[str, object], names: tuple[str, ...]) -> None:
    both = [name for name in names if name in given]
    if len(both) > 1:
        raise ValueError(f"{' and '.join(both)} exclude each other")
