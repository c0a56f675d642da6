"""From messages of the contract to the dataclasses of ``_types``."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from enum import StrEnum
from typing import Any, TypeVar

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message

from venturi import _types
from venturi._errors import VenturiError
from venturi._types import Choice, Chunk, Generation, TokenLogprobs
from venturi.v1 import inference_pb2 as pb
from venturi.v1 import model_pb2

T = TypeVar("T")


def from_proto(cls: type[T], message: Message) -> T:
    """Copies fields by name. One that is unset and has a default in ``cls`` keeps the default."""
    values = {}
    for target in fields(cls):  # type: ignore[arg-type]  # T is a dataclass of _types
        source = message.DESCRIPTOR.fields_by_name[target.name.removesuffix("_s")]
        optional = target.default is not MISSING and source.has_presence
        if not optional or message.HasField(source.name):
            values[target.name] = _value(source, getattr(message, source.name))
    return cls(**values)


# Descriptors and values are of any field, so that these two are typed by what they are given.
def _value(source: Any, value: Any) -> object:
    if source.is_repeated:
        return tuple(_item(source, item) for item in value)
    return _item(source, value)


def _item(source: Any, value: Any) -> object:
    if source.enum_type is not None:
        return _enum(source.enum_type, value)
    if source.message_type is None:
        return value
    if source.message_type.name == "Duration":
        return value.ToTimedelta().total_seconds()
    return from_proto(getattr(_types, source.message_type.name), value)


def _enum(source: EnumDescriptor, number: int) -> StrEnum:
    names = source.values_by_number
    # A value that is newer than this client reads as UNSPECIFIED.
    name = names.get(number, names[0]).name
    prefix = names[0].name.removesuffix("UNSPECIFIED")
    cls: type[StrEnum] = getattr(_types, source.name)
    return cls[name.removeprefix(prefix)]


@dataclass(slots=True)
class _Parts:
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: pb.ChoiceFinish = field(default_factory=pb.ChoiceFinish)


class Collector:
    """Puts a response together from its pieces; ``partial`` is what has come so far."""

    def __init__(self, request_id: str = "") -> None:
        self._parts: dict[int, _Parts] = defaultdict(_Parts)
        self._info = pb.PromptInfo(request_id=request_id)
        self._summary: pb.Summary | None = None

    @property
    def partial(self) -> str:
        """Text of the first choice."""
        return "".join(self._parts[0].text)

    @property
    def request_id(self) -> str:
        """The caller's id of the request, or the server's once the first piece has come."""
        return self._info.request_id

    def add(self, message: pb.GenerateStreamResponse) -> list[Chunk]:
        """Takes one message and returns the chunks in it."""
        if message.HasField("prompt_info"):
            self._info = message.prompt_info
        for finish in message.finishes:
            self._parts[finish.index].finish = finish
        if message.HasField("summary"):
            self._summary = message.summary
        return [self._add_chunk(chunk) for chunk in message.chunks]

    def _add_chunk(self, message: pb.Chunk) -> Chunk:
        chunk = Chunk(
            index=message.index,
            text=message.text_delta,
            token_ids=tuple(message.token_ids),
            logprobs=_logprobs(message.logprobs),
        )
        parts = self._parts[chunk.index]
        parts.text.append(chunk.text)
        parts.token_ids.extend(chunk.token_ids)
        parts.logprobs.extend(chunk.logprobs)
        return chunk

    def generation(self) -> Generation:
        """The whole response. Raises VenturiError when the summary has not come."""
        if self._summary is None:
            raise VenturiError(
                "The response ended without its summary.",
                request_id=self.request_id,
                partial=self.partial,
            )
        info = self._info
        compression = from_proto(_types.CompressionReport, info.compression)
        return Generation(
            request_id=info.request_id,
            model=info.model,
            variant=info.variant,
            choices=tuple(_choice(index, parts) for index, parts in sorted(self._parts.items())),
            usage=from_proto(_types.Usage, self._summary.usage),
            timings=from_proto(_types.Timings, self._summary.timings),
            compression=compression if info.HasField("compression") else None,
            prompt_logprobs=_logprobs(info.prompt_logprobs),
        )


def generation(message: pb.GenerateResponse) -> Generation:
    """A unary response: the pieces of a stream in one message."""
    collector = Collector()
    collector.add(
        pb.GenerateStreamResponse(
            prompt_info=message.prompt_info,
            chunks=[
                pb.Chunk(
                    index=choice.index,
                    text_delta=choice.text,
                    token_ids=choice.token_ids,
                    logprobs=choice.logprobs,
                )
                for choice in message.choices
            ],
            finishes=[choice.finish for choice in message.choices],
            summary=message.summary,
        )
    )
    return collector.generation()


def join_files(pieces: Iterable[model_pb2.GetTokenizerResponse]) -> dict[str, bytes]:
    """Files by name. Raises VenturiError where one is not what its checksum says."""
    files: dict[str, bytes] = defaultdict(bytes)
    checksums: dict[str, str] = {}
    for piece in pieces:
        files[piece.file_name] += piece.data
        checksums[piece.file_name] = piece.sha256
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != checksums[name]:
            raise VenturiError(f"{name} arrived damaged: its SHA-256 is another")
    return dict(files)


def _choice(index: int, parts: _Parts) -> Choice:
    matched = parts.finish.WhichOneof("matched_stop")
    reason = _enum(pb.FinishReason.DESCRIPTOR, parts.finish.reason)
    return Choice(
        index=index,
        text="".join(parts.text),
        token_ids=tuple(parts.token_ids),
        finish_reason=_types.FinishReason(reason),
        matched_stop=getattr(parts.finish, matched) if matched else None,
        logprobs=tuple(parts.logprobs),
    )


def _logprobs(messages: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(from_proto(TokenLogprobs, message) for message in messages)
