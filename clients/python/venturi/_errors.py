"""The exceptions of the client, and the one place where a gRPC status becomes one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

_DETAIL_TYPES = (
    error_details_pb2.BadRequest,
    error_details_pb2.ErrorInfo,
    error_details_pb2.PreconditionFailure,
    error_details_pb2.QuotaFailure,
    error_details_pb2.RequestInfo,
    error_details_pb2.ResourceInfo,
    error_details_pb2.RetryInfo,
)


class VenturiError(Exception):
    """Base of all errors of this package.

    Attributes:
        message: What went wrong, for people.
        code: The gRPC status code; None where no status was received.
        request_id: The request's id in the server's logs, or "".
        retry_after: Seconds to wait before trying again, where the server said so.
        details: The ``google.rpc`` messages that came with the status.
        partial: Text of the first choice that had arrived before a stream failed.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        request_id: str = "",
        details: Sequence[Message] = (),
        partial: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.request_id = request_id
        self.details = tuple(details)
        self.partial = partial

    @property
    def retry_after(self) -> float | None:
        """Seconds, from ``google.rpc.RetryInfo``."""
        for detail in self.details:
            if isinstance(detail, error_details_pb2.RetryInfo):
                return float(detail.retry_delay.ToTimedelta().total_seconds())
        return None


class APIConnectionError(VenturiError):
    """The server could not be reached, or the connection was lost."""


class APITimeoutError(VenturiError):
    """The call's deadline passed (DEADLINE_EXCEEDED)."""


class APIStatusError(VenturiError):
    """The server ended the call with an error status."""


class FieldViolation(NamedTuple):
    """A field of the request, by its path in the proto, and what is wrong with it."""

    field: str
    description: str


class BadRequestError(APIStatusError):
    """A parameter is wrong (INVALID_ARGUMENT)."""

    @property
    def violations(self) -> list[FieldViolation]:
        """The fields at fault, where the server named them."""
        return [
            FieldViolation(violation.field, violation.description)
            for detail in self.details
            if isinstance(detail, error_details_pb2.BadRequest)
            for violation in detail.field_violations
        ]


class AuthenticationError(APIStatusError):
    """The key is missing or wrong (UNAUTHENTICATED)."""


class PermissionDeniedError(APIStatusError):
    """The key does not allow this (PERMISSION_DENIED)."""


class NotFoundError(APIStatusError):
    """No such model, variant or service (NOT_FOUND)."""


class RateLimitError(APIStatusError):
    """The queue is full or a limit is reached (RESOURCE_EXHAUSTED)."""


class FailedPreconditionError(APIStatusError):
    """The server lacks a part that the request needs (FAILED_PRECONDITION)."""


class UnavailableError(APIStatusError):
    """The server is starting, draining or restarting its engine (UNAVAILABLE)."""


class UnimplementedError(APIStatusError):
    """The server does not serve this call or option (UNIMPLEMENTED)."""


class InternalServerError(APIStatusError):
    """The server failed (INTERNAL, UNKNOWN, DATA_LOSS)."""


_CLASSES: dict[grpc.StatusCode, type[VenturiError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: BadRequestError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: RateLimitError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: APITimeoutError,
    grpc.StatusCode.INTERNAL: InternalServerError,
    grpc.StatusCode.UNKNOWN: InternalServerError,
    grpc.StatusCode.DATA_LOSS: InternalServerError,
}


def from_rpc_error(
    error: grpc.RpcError, *, request_id: str = "", partial: str = ""
) -> VenturiError:
    """The typed error of a failed call; ``request_id`` is used where the server sent none."""
    code = error.code()
    pairs: Any = error.trailing_metadata() or ()  # tuples; an aio.Metadata from grpc.aio
    trailers: dict[str, str | bytes] = dict(pairs)
    cls = _CLASSES.get(code, APIStatusError)
    # The server's own UNAVAILABLE has trailers (RetryInfo); gRPC's, of a broken connection, none.
    if cls is UnavailableError and not trailers:
        cls = APIConnectionError
    # gRPC's own RESOURCE_EXHAUSTED: the message is too large, now and at any other time.
    if cls is RateLimitError and not trailers and "larger than max" in (error.details() or ""):
        cls = BadRequestError
    return cls(
        error.details() or code.name,
        code=code,
        request_id=_text(trailers.get("x-request-id")) or request_id,
        details=_details(trailers.get("grpc-status-details-bin")),
        partial=partial,
    )


def _text(value: str | bytes | None) -> str:
    return value if isinstance(value, str) else ""


def _details(value: str | bytes | None) -> list[Message]:
    if not isinstance(value, bytes):
        return []
    try:
        return [_unpack(packed) for packed in status_pb2.Status.FromString(value).details]
    except DecodeError:  # a broken detail must not hide the status
        return []


def _unpack(packed: AnyMessage) -> Message:
    for cls in _DETAIL_TYPES:
        detail: Message = cls()
        if packed.Unpack(detail):
            return detail
    return packed
