"""Each status becomes its class, with the details that came with it."""

import pickle
import socket
import time

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2 as rpc

import venturi
from venturi import AsyncClient, Client
from venturi.testing import Failure, FakeServer, Script

_Code = grpc.StatusCode
_CLASSES = {
    _Code.INVALID_ARGUMENT: venturi.BadRequestError,
    _Code.NOT_FOUND: venturi.NotFoundError,
    _Code.PERMISSION_DENIED: venturi.PermissionDeniedError,
    _Code.UNAUTHENTICATED: venturi.AuthenticationError,
    _Code.RESOURCE_EXHAUSTED: venturi.RateLimitError,
    _Code.FAILED_PRECONDITION: venturi.FailedPreconditionError,
    _Code.UNIMPLEMENTED: venturi.UnimplementedError,
    _Code.INTERNAL: venturi.InternalServerError,
    _Code.UNKNOWN: venturi.InternalServerError,
    _Code.DEADLINE_EXCEEDED: venturi.APITimeoutError,
    _Code.ABORTED: venturi.APIStatusError,
    _Code.CANCELLED: venturi.APIStatusError,
}


@pytest.mark.parametrize(("code", "cls"), _CLASSES.items(), ids=str)
def test_a_status_becomes_its_class(
    client: Client, server: FakeServer, code: grpc.StatusCode, cls: type[venturi.VenturiError]
) -> None:
    server.script.failure = Failure(code=code, message="no")
    with pytest.raises(venturi.VenturiError) as caught:
        client.generate("x")
    error = caught.value
    assert type(error) is cls
    assert (error.code, error.message, str(error)) == (code, "no", "no")
    assert error.request_id == "fake-1"
    assert (error.retry_after, error.details, error.partial) == (None, (), "")
    assert isinstance(error.__cause__, grpc.RpcError)


@pytest.mark.parametrize("code", [_Code.CANCELLED, _Code.INTERNAL])
async def test_the_async_client_raises_the_same(
    async_client: AsyncClient, server: FakeServer, code: grpc.StatusCode
) -> None:
    server.script.failure = Failure(code=code, message="no")
    with pytest.raises(_CLASSES[code]) as caught:
        await async_client.generate("x")
    assert (caught.value.code, caught.value.request_id) == (code, "fake-1")
    async with async_client.stream("x") as stream:
        with pytest.raises(_CLASSES[code]):
            await stream.get_final_response()


def test_violations_name_the_fields(client: Client, server: FakeServer) -> None:
    violation = rpc.BadRequest.FieldViolation(field="sampling.top_p", description="not in (0, 1]")
    details = [rpc.BadRequest(field_violations=[violation]), rpc.ErrorInfo(reason="TOP_P")]
    failure = Failure(code=_Code.INVALID_ARGUMENT, message="bad", details=details)
    server.script.failure = failure
    with pytest.raises(venturi.BadRequestError) as caught:
        client.generate("x", top_p=7)
    assert caught.value.violations == [("sampling.top_p", "not in (0, 1]")]
    assert caught.value.details == tuple(details)


def test_a_message_that_is_too_large_is_the_callers_mistake(client: Client) -> None:
    with pytest.raises(venturi.BadRequestError, match="larger than max"):
        client.generate("x" * (5 << 20))


def test_retry_after_is_in_seconds(client: Client, server: FakeServer) -> None:
    details = [rpc.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000))]
    failure = Failure(code=_Code.RESOURCE_EXHAUSTED, message="full", details=details)
    server.script.failure = failure
    with pytest.raises(venturi.RateLimitError) as caught:
        client.generate("x")
    assert caught.value.retry_after == 1.5


def test_unknown_and_broken_details_do_not_hide_the_status(
    client: Client, server: FakeServer
) -> None:
    failure = Failure(code=_Code.INTERNAL, message="no", details=[Duration(seconds=1)])
    server.script.failure = failure
    with pytest.raises(venturi.InternalServerError) as caught:
        client.generate("x")
    assert len(caught.value.details) == 1
    broken = venturi._errors._details(b"\xff\xff")
    assert broken == []


def test_an_error_survives_pickling() -> None:
    error = venturi.RateLimitError("full", code=_Code.RESOURCE_EXHAUSTED, request_id="r")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.message, copy.code) == (type(error), "full", error.code)
    assert copy.request_id == "r"


def test_the_timeout_is_the_deadline(client: Client, server: FakeServer) -> None:
    server.script.delay_s = 30
    start = time.monotonic()
    with pytest.raises(venturi.APITimeoutError):
        client.generate("x", timeout=0.1)
    assert time.monotonic() - start < 2
    assert server.wait_cancelled()


async def test_the_async_timeout_of_a_stream_keeps_the_text(
    async_client: AsyncClient, server: FakeServer
) -> None:
    server.script = Script(chunks=["x"] * 1000, delay_s=0.02)
    async with async_client.stream("x", timeout=0.3) as stream:
        with pytest.raises(venturi.APITimeoutError) as caught:
            await stream.get_final_response()
    assert caught.value.partial.startswith("x")


def _pushback(milliseconds: int) -> Failure:
    """What the server sends while it starts."""
    return Failure(
        code=_Code.UNAVAILABLE,
        message="starting",
        details=[rpc.RetryInfo(retry_delay=Duration(seconds=2))],
        metadata={"grpc-retry-pushback-ms": str(milliseconds)},
    )


def test_unavailable_is_retried_before_the_first_token(client: Client, server: FakeServer) -> None:
    server.script = Script(failure=_pushback(10), fail_times=2)
    with client.stream("x") as stream:
        assert stream.get_final_response().text == "Hello, world"
    assert len(server.requests) == 3


def test_the_servers_pushback_is_honoured(client: Client, server: FakeServer) -> None:
    server.script = Script(failure=_pushback(300), fail_times=1)
    start = time.monotonic()
    client.generate("x")
    assert time.monotonic() - start >= 0.3


def test_unavailable_after_the_last_attempt(server: FakeServer) -> None:
    server.script = Script(failure=_pushback(-1))
    with (
        Client(server.target) as client,
        pytest.raises(venturi.UnavailableError, match="starting") as caught,
    ):
        client.generate("x")
    assert caught.value.retry_after == 2.0
    assert len(server.requests) == 1


async def test_without_retries_there_is_one_attempt(server: FakeServer) -> None:
    server.script = Script(failure=_pushback(0))
    async with AsyncClient(server.target, max_retries=0) as client:
        with pytest.raises(venturi.UnavailableError):
            await client.generate("x")
    assert len(server.requests) == 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_refused_connection() -> None:
    with (
        Client(f"127.0.0.1:{_free_port()}", max_retries=0) as client,
        pytest.raises(venturi.APIConnectionError, match="refused") as caught,
    ):
        client.generate("x", request_id="mine")
    assert caught.value.code is _Code.UNAVAILABLE
    assert caught.value.request_id == "mine"


async def test_a_refused_connection_async() -> None:
    async with AsyncClient(f"127.0.0.1:{_free_port()}", max_retries=0) as client:
        with pytest.raises(venturi.APIConnectionError, match="refused"):
            await client.health()
        async with client.stream("x", request_id="mine") as stream:
            with pytest.raises(venturi.APIConnectionError) as caught:
                await stream.get_final_response()
    assert caught.value.request_id == "mine"


def test_a_lost_connection_carries_the_text_so_far() -> None:
    script = Script(chunks=["x"] * 1000, delay_s=0.01)
    with (
        FakeServer(script) as server,
        Client(server.target) as client,
        client.stream("x") as stream,
    ):
        assert next(stream).text == "x"
        server.stop()
        with pytest.raises(venturi.VenturiError) as caught:
            stream.get_final_response()
    assert caught.value.partial.startswith("x")


def test_tls_does_not_fall_back_to_plain_text(server: FakeServer) -> None:
    with (
        Client(server.target, secure=True, max_retries=0) as client,
        pytest.raises(venturi.APIConnectionError),
    ):
        client.health()
    assert not server.requests
