"""Server streams as context managers, for both clients.

A gRPC stream that is merely dropped runs on at the server. A stream here therefore starts with
its block, is cancelled at the block's end, and refuses to be read outside of one.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Self, TypeVar

import grpc

from venturi._convert import Collector
from venturi._errors import VenturiError, from_rpc_error
from venturi._types import Chunk, Generation

T = TypeVar("T")


class _StreamState(Generic[T]):
    """All of a stream but the waiting, which is what differs between the two clients."""

    def __init__(
        self,
        start: Callable[[], Any],
        decode: Callable[[Any], Iterable[T]],
        collector: Collector | None = None,
    ) -> None:
        self._start = start
        self._decode = decode
        self._collector = collector or Collector()
        self._rpc: Any = None
        self._events: deque[T] = deque()
        self._ended = False
        self._closed = False

    @property
    def request_id(self) -> str:
        """The request's id; "" until the first message where the caller chose none."""
        return self._collector.request_id

    def _open(self) -> Self:
        if self._rpc is not None:
            raise RuntimeError("A stream is opened once: call the client again for another.")
        self._rpc = self._start()
        return self

    def _cancel(self) -> None:
        self._closed = True
        if self._rpc is not None:
            self._rpc.cancel()

    def _running(self) -> Any:
        if self._rpc is None:
            raise RuntimeError("Open the stream first, as in `with client.stream(...) as stream:`.")
        if self._closed:
            raise self._error("The stream was closed before its end.")
        return self._rpc

    def _take(self, message: object | None) -> None:
        """Takes the next message, or None for the stream's end."""
        if message is None:
            self._ended = True
        else:
            self._events.extend(self._decode(message))

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            partial, request_id = self._collector.partial, self.request_id
            raise from_rpc_error(error, request_id=request_id, partial=partial) from error
        except asyncio.CancelledError as error:
            # grpc.aio also raises this where another task closes the stream or its client.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise self._error("The stream was closed while it was read.") from error

    def _error(self, message: str) -> VenturiError:
        partial = self._collector.partial
        return VenturiError(message, request_id=self.request_id, partial=partial)


class EventStream(_StreamState[T]):
    """An iterator over a server stream: ``with client.watch_startup() as events: ...``."""

    def __enter__(self) -> Self:
        return self._open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        while not self._events and not self._ended:
            with self._translated_errors():
                self._take(next(self._running(), None))
        if not self._events:
            raise StopIteration
        return self._events.popleft()

    def close(self) -> None:
        """Cancels the call, if it still runs."""
        self._cancel()


class TextStream(EventStream[Chunk]):
    """The chunks of a response, as they come: ``with client.stream(...) as stream: ...``."""

    @property
    def text_stream(self) -> Iterator[str]:
        """The text of the first choice, piece by piece."""
        return (chunk.text for chunk in self if chunk.index == 0 and chunk.text)

    def get_final_response(self) -> Generation:
        """Reads the stream to its end and returns all of it. Raises as iterating does."""
        for _ in self:
            pass
        return self._collector.generation()


class AsyncEventStream(_StreamState[T]):
    """An iterator over a server stream: ``async with client.watch_startup() as events: ...``."""

    async def __aenter__(self) -> Self:
        return self._open()

    async def __aexit__(self, *_: object) -> None:
        self._cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        while not self._events and not self._ended:
            with self._translated_errors():
                message = await self._running().read()
                self._take(None if message is grpc.aio.EOF else message)
        if not self._events:
            raise StopAsyncIteration
        return self._events.popleft()

    async def close(self) -> None:
        """Cancels the call, if it still runs."""
        self._cancel()


class AsyncTextStream(AsyncEventStream[Chunk]):
    """The chunks of a response, as they come: ``async with client.stream(...) as stream: ...``."""

    @property
    async def text_stream(self) -> AsyncIterator[str]:
        """The text of the first choice, piece by piece."""
        async for chunk in self:
            if chunk.index == 0 and chunk.text:
                yield chunk.text

    async def get_final_response(self) -> Generation:
        """Reads the stream to its end and returns all of it. Raises as iterating does."""
        async for _ in self:
            pass
        return self._collector.generation()
