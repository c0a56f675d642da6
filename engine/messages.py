"""Messages between the front end and an engine process: msgspec structs in MessagePack.

Never pickle: a message is data of the types named here, or it is refused.
"""

import msgspec

from engine.config import EngineConfig
from engine.types import EngineStats, ModelReport, Request, StepOutput


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Adds a request; answered by its events."""

    request: Request


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """Ends a request, or one choice; unknown ids are ignored, since it may just have ended."""

    id: str
    choice: int | None = None


class GetStats(msgspec.Struct, tag=True, frozen=True):
    """Asks for one ``Stats``."""


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """Ends the process."""


class Loading(msgspec.Struct, tag=True, frozen=True):
    """Layer ``item`` of ``items`` is loaded."""

    item: int
    items: int
    detail: str


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The model is loaded; requests may come."""

    report: ModelReport


class Events(msgspec.Struct, tag=True, frozen=True):
    """What a step produced."""

    output: StepOutput


class Stats(msgspec.Struct, tag=True, frozen=True):
    """Answer to ``GetStats``."""

    stats: EngineStats


class LoadFailed(msgspec.Struct, tag=True, frozen=True):
    """The model cannot be loaded, and trying again would not help."""

    message: str


ToEngine = Submit | Cancel | GetStats | Shutdown
FromEngine = Loading | Ready | Events | Stats | LoadFailed

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder[ToEngine](ToEngine)
_from_engine = msgspec.msgpack.Decoder[FromEngine](FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """One message as bytes."""
    return _encoder.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    """Inverse of ``encode`` in the engine. Raises ``msgspec.ValidationError``."""
    message: ToEngine = _to_engine.decode(data)
    return message


def decode_from_engine(data: bytes) -> FromEngine:
    """Inverse of ``encode`` in the front end. Raises ``msgspec.ValidationError``."""
    message: FromEngine = _from_engine.decode(data)
    return message


def encode_config(config: EngineConfig) -> str:
    """As JSON, for another process."""
    return msgspec.json.encode(config, enc_hook=str).decode()


def decode_config(text: str) -> EngineConfig:
    """Inverse of ``encode_config``."""
    return msgspec.json.decode(text, type=EngineConfig, dec_hook=lambda kind, value: kind(value))
