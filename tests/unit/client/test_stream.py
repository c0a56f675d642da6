"""A stream gives its pieces as they come, and never outlives its block."""

import asyncio
import threading
import time

import grpc
import pytest

from venturi import (
    AsyncClient,
    Client,
    FinishReason,
    InternalServerError,
    UnavailableError,
    VenturiError,
)
from venturi.testing import Failure, FakeServer, Script
from venturi.v1 import inference_pb2 as pb


def _endless() -> Script:
    return Script(chunks=["x"] * 10_000, delay_s=0.01)


class _OwnError(Exception):
    pass


def test_iterating_gives_the_chunks(client: Client) -> None:
    with client.stream("abc", request_id="mine") as stream:
        chunks = list(stream)
        assert stream.request_id == "mine"
    assert [chunk.text for chunk in chunks] == ["Hello", ",", " world"]
    assert chunks[1].token_ids == (ord(","),)


def test_the_final_response_equals_the_unary_one(client: Client) -> None:
    expected = client.generate("abc", request_id="mine")
    with client.stream("abc", request_id="mine") as stream:
        assert next(stream.text_stream) == "Hello"
        assert stream.get_final_response() == expected
    assert stream.get_final_response().finish_reason is FinishReason.EOS


async def test_the_async_stream_gives_the_same(async_client: AsyncClient, client: Client) -> None:
    expected = client.generate("abc", request_id="mine")
    async with async_client.stream("abc", request_id="mine") as stream:
        assert [text async for text in stream.text_stream] == ["Hello", ",", " world"]
        assert await stream.get_final_response() == expected
    async with async_client.stream("abc") as stream:
        assert [chunk.text async for chunk in stream] == ["Hello", ",", " world"]


def test_the_first_token_comes_before_the_last_is_made(client: Client, server: FakeServer) -> None:
    server.script = _endless()
    start = time.monotonic()
    with client.stream("x") as stream:
        next(stream)
        assert time.monotonic() - start < 1.0


def test_leaving_the_block_cancels_the_call(client: Client, server: FakeServer) -> None:
    server.script = _endless()
    with client.stream("x") as stream:
        for _ in stream:
            break
    assert server.wait_cancelled()
    assert isinstance(server.cancelled[0], pb.GenerateStreamRequest)


def test_an_exception_in_the_block_cancels_the_call(client: Client, server: FakeServer) -> None:
    server.script = _endless()

    def read_one_and_fail() -> None:
        with client.stream("x") as stream:
            next(stream)
            raise _OwnError

    with pytest.raises(_OwnError):
        read_one_and_fail()
    assert server.wait_cancelled()


async def test_leaving_the_async_block_cancels_the_call(
    async_client: AsyncClient, server: FakeServer
) -> None:
    server.script = _endless()
    async with async_client.stream("x") as stream:
        async for _ in stream:
            break
    assert await asyncio.to_thread(server.wait_cancelled)


async def test_an_exception_in_the_async_block_cancels_the_call(
    async_client: AsyncClient, server: FakeServer
) -> None:
    server.script = _endless()

    async def read_one_and_fail() -> None:
        async with async_client.stream("x") as stream:
            await anext(stream)
            raise _OwnError

    with pytest.raises(_OwnError):
        await read_one_and_fail()
    assert await asyncio.to_thread(server.wait_cancelled)


async def test_cancelling_the_task_cancels_the_call(
    async_client: AsyncClient, server: FakeServer
) -> None:
    server.script = _endless()

    async def consume() -> None:
        async with async_client.stream("x") as stream:
            async for _ in stream:
                pass

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(consume(), 0.1)
    assert await asyncio.to_thread(server.wait_cancelled)


async def test_leaving_before_the_first_token_cancels_the_call(
    async_client: AsyncClient, server: FakeServer
) -> None:
    server.script = Script(delay_s=30)
    async with async_client.stream("x"):
        await asyncio.to_thread(_wait_for_request, server)
    assert await asyncio.to_thread(server.wait_cancelled)


def _wait_for_request(server: FakeServer) -> None:
    while not server.requests:
        time.sleep(0.01)


def test_a_complete_stream_is_not_cancelled(client: Client, server: FakeServer) -> None:
    with client.stream("x") as stream:
        stream.get_final_response()
    client.generate("x")
    assert not server.cancelled


def test_a_stream_outside_of_a_block_is_refused_and_nothing_is_sent(
    client: Client, server: FakeServer
) -> None:
    with pytest.raises(RuntimeError, match=r"with client.stream\(...\) as stream"):
        next(iter(client.stream("x")))
    assert not server.requests


async def test_an_async_stream_outside_of_a_block_is_refused(async_client: AsyncClient) -> None:
    with pytest.raises(RuntimeError, match=r"with client.stream\(...\) as stream"):
        await async_client.stream("x").get_final_response()


def test_a_stream_is_opened_once(client: Client) -> None:
    stream = client.stream("x")
    with stream:
        pass
    with pytest.raises(RuntimeError, match="opened once"), stream:
        pass


def test_reading_after_the_block_is_an_error(client: Client, server: FakeServer) -> None:
    server.script = _endless()
    with client.stream("x") as stream:
        assert next(stream).text == "x"
    with pytest.raises(VenturiError, match="closed before its end") as caught:
        stream.get_final_response()
    assert caught.value.partial == "x"


def test_another_thread_may_close_the_stream(client: Client, server: FakeServer) -> None:
    server.script = _endless()
    with client.stream("x") as stream:
        next(stream)
        timer = threading.Timer(0.1, stream.close)
        timer.start()
        with pytest.raises(VenturiError) as caught:
            stream.get_final_response()
    timer.join()
    assert caught.value.partial


async def test_another_task_may_close_the_stream(
    async_client: AsyncClient, server: FakeServer
) -> None:
    """Seen as an error, not as a cancellation of the reading task."""
    server.script = Script(delay_s=30)
    async with async_client.stream("x") as stream:
        reading = asyncio.ensure_future(stream.get_final_response())
        await asyncio.to_thread(_wait_for_request, server)
        await stream.close()
        with pytest.raises(VenturiError, match="closed"):
            await reading


_BROKEN = Failure(code=grpc.StatusCode.INTERNAL, message="engine failed")


def test_a_failure_in_the_middle_carries_the_text_so_far(
    client: Client, server: FakeServer
) -> None:
    server.script = Script(failure=_BROKEN, fail_after=2)
    with client.stream("x") as stream, pytest.raises(InternalServerError) as caught:
        stream.get_final_response()
    assert caught.value.partial == "Hello,"
    assert caught.value.request_id == "fake-1"
    assert not server.cancelled


async def test_an_async_failure_in_the_middle_carries_the_text_so_far(
    async_client: AsyncClient, server: FakeServer
) -> None:
    server.script = Script(failure=_BROKEN, fail_after=1)
    async with async_client.stream("x") as stream:
        with pytest.raises(InternalServerError) as caught:
            await stream.get_final_response()
    assert caught.value.partial == "Hello"


def test_a_stream_that_has_begun_is_not_retried(client: Client, server: FakeServer) -> None:
    failure = Failure(code=grpc.StatusCode.UNAVAILABLE, message="engine restarts")
    server.script = Script(failure=failure, fail_after=1)
    with client.stream("x") as stream, pytest.raises(UnavailableError) as caught:
        stream.get_final_response()
    assert caught.value.partial == "Hello"
    assert len(server.requests) == 1
