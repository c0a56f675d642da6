"""Python client of the Venturi inference service.

    from venturi import Client

    with Client("127.0.0.1:50051") as client:
        print(client.generate("Once upon a time", max_tokens=32).text)

``venturi.testing`` has a fake server for tests of programs that use this package.
"""

from venturi._async_client import AsyncClient
from venturi._client import Client
from venturi._errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    FailedPreconditionError,
    FieldViolation,
    InternalServerError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    UnavailableError,
    UnimplementedError,
    VenturiError,
)
from venturi._options import ChatMessage, GenerateOptions, PromptCompression, StreamOptions
from venturi._stream import AsyncEventStream, AsyncTextStream, EventStream, TextStream
from venturi._types import (
    Alarm,
    Choice,
    Chunk,
    CompressionReport,
    Fallback,
    FinishReason,
    Generation,
    KvCache,
    LayerActivity,
    LayerSummary,
    Load,
    MeasuredQuality,
    MeasuredSpeed,
    Model,
    Monitoring,
    Phase,
    Precision,
    Provenance,
    StartupEvent,
    Timings,
    Tokenization,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)

__all__ = [
    "APIConnectionError",
    "APIStatusError",
    "APITimeoutError",
    "Alarm",
    "AsyncClient",
    "AsyncEventStream",
    "AsyncTextStream",
    "AuthenticationError",
    "BadRequestError",
    "ChatMessage",
    "Choice",
    "Chunk",
    "Client",
    "CompressionReport",
    "EventStream",
    "FailedPreconditionError",
    "Fallback",
    "FieldViolation",
    "FinishReason",
    "GenerateOptions",
    "Generation",
    "InternalServerError",
    "KvCache",
    "LayerActivity",
    "LayerSummary",
    "Load",
    "MeasuredQuality",
    "MeasuredSpeed",
    "Model",
    "Monitoring",
    "NotFoundError",
    "PermissionDeniedError",
    "Phase",
    "Precision",
    "PromptCompression",
    "Provenance",
    "RateLimitError",
    "StartupEvent",
    "StreamOptions",
    "TextStream",
    "Timings",
    "TokenLogprob",
    "TokenLogprobs",
    "Tokenization",
    "UnavailableError",
    "UnimplementedError",
    "Usage",
    "VenturiError",
]
