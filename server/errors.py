"""The one place where an exception becomes a status: a table, and its google.rpc details."""

from collections.abc import Callable

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details
from google.rpc import status_pb2

from engine.errors import (
    DeadlineExceeded,
    EngineError,
    EngineUnavailable,
    GenerationFailed,
    InvalidRequest,
    NotServed,
    Overloaded,
    UnknownModel,
)

Code = grpc.StatusCode
DOMAIN = "venturi"
_MAX_TEXT = 500


def _field(error: EngineError) -> list[Message]:
    assert isinstance(error, InvalidRequest | NotServed)
    violation = details.BadRequest.FieldViolation(
        field=error.field, description=str(error)[:_MAX_TEXT]
    )
    return [details.BadRequest(field_violations=[violation])]


def _retry(error: EngineError) -> list[Message]:
    assert isinstance(error, EngineUnavailable | Overloaded)
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(int(error.retry_after_s * 1000))
    return [details.RetryInfo(retry_delay=delay)]


def _quota(error: EngineError) -> list[Message]:
    violation = details.QuotaFailure.Violation(subject="requests", description=str(error))
    return [*_retry(error), details.QuotaFailure(violations=[violation])]


def _resource(error: EngineError) -> list[Message]:
    assert isinstance(error, UnknownModel)
    return [details.ResourceInfo(resource_type="model", resource_name=error.name[:_MAX_TEXT])]


def _none(error: EngineError) -> list[Message]:
    return []


TABLE: dict[type[EngineError], tuple[Code, Callable[[EngineError], list[Message]]]] = {
    InvalidRequest: (Code.INVALID_ARGUMENT, _field),
    NotServed: (Code.UNIMPLEMENTED, _field),
    UnknownModel: (Code.NOT_FOUND, _resource),
    Overloaded: (Code.RESOURCE_EXHAUSTED, _quota),
    EngineUnavailable: (Code.UNAVAILABLE, _retry),
    DeadlineExceeded: (Code.DEADLINE_EXCEEDED, _none),
    GenerationFailed: (Code.INTERNAL, _none),
}
# These say nothing but the request's id: what went wrong inside is for the log.
_SILENT = (GenerationFailed,)


def to_status(error: Exception, request_id: str) -> status_pb2.Status:
    """The status of any exception. What is not in the table is INTERNAL and says nothing."""
    code, message = Code.INTERNAL, f"internal error, request {request_id}"
    specific: list[Message] = []
    if isinstance(error, EngineError) and type(error) in TABLE:
        code, make_details = TABLE[type(error)]
        specific = make_details(error)
        if not isinstance(error, _SILENT):
            message = _with_field(error)
    packed = [_pack(details.ErrorInfo(reason=code.name, domain=DOMAIN))]
    packed += [_pack(detail) for detail in specific]
    packed.append(_pack(details.RequestInfo(request_id=request_id)))
    return status_pb2.Status(code=code.value[0], message=message, details=packed)


def code_of(status: status_pb2.Status) -> Code:
    """grpc's enum for a google.rpc status."""
    return next(code for code in Code if code.value[0] == status.code)


def retry_after_ms(status: status_pb2.Status) -> int | None:
    """Milliseconds of the status's RetryInfo."""
    info = details.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info):
            return int(info.retry_delay.ToMilliseconds())
    return None


def _with_field(error: Exception) -> str:
    field = getattr(error, "field", "")
    text = f"{field}: {error}" if field else str(error)
    # All trailers together must stay below 16 KiB, and the details repeat the text.
    return text[:_MAX_TEXT]


def _pack(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
