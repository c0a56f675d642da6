"""The asyncio client."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Self, TypeVar, Unpack

import grpc

from venturi import _convert, _requests
from venturi._base import BaseClient
from venturi._convert import Collector
from venturi._errors import from_rpc_error
from venturi._options import Chat, GenerateOptions, Prompt, StreamOptions
from venturi._requests import Call
from venturi._stream import AsyncEventStream, AsyncTextStream
from venturi._types import Generation, Load, Model, StartupEvent, Tokenization

T = TypeVar("T")


class AsyncClient(BaseClient):
    """``Client`` for asyncio: the same methods, awaited. It belongs to one event loop.

    Every method raises a ``VenturiError`` when its call fails.
    """

    _transport = grpc.aio

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; calls that still run are cancelled."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Runs a prompt (text, token ids or messages) and returns the whole response."""
        return await self._run(_requests.generate(prompt, options))

    def stream(self, prompt: Prompt, **options: Unpack[StreamOptions]) -> AsyncTextStream:
        """The response as it is made: ``async with client.stream(prompt) as stream: ...``.

        Leaving the block cancels what is left. Iterating gives ``Chunk``s; an error in the
        middle carries the text so far in ``partial``.
        """
        collector = Collector(options.get("request_id") or "")
        call = _requests.stream(prompt, options, collector.add)
        return AsyncTextStream(partial(self._send, call), call.convert, collector)

    async def tokenize(
        self,
        prompt: str | Chat,
        *,
        model: str = "",
        add_special_tokens: bool | None = None,
        add_generation_prompt: bool | None = None,
        template_kwargs: Mapping[str, object] | None = None,
        timeout: float | None = None,
    ) -> Tokenization:
        """Token ids of a text, or of messages in the model's chat template.

        ``add_generation_prompt`` and ``template_kwargs`` are for messages.
        """
        chat = {"add_generation_prompt": add_generation_prompt, "template_kwargs": template_kwargs}
        return await self._run(_requests.tokenize(prompt, model, add_special_tokens, chat, timeout))

    async def detokenize(
        self,
        token_ids: Iterable[int],
        *,
        model: str = "",
        skip_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> str:
        """Text of token ids."""
        return await self._run(_requests.detokenize(token_ids, model, skip_special_tokens, timeout))

    async def tokenizer_files(
        self, model: str = "", *, timeout: float | None = None
    ) -> dict[str, bytes]:
        """The files of the model's tokenizer, by name: ``tokenizer.json`` and others."""
        call = _requests.tokenizer_files(model, timeout)
        async with AsyncEventStream(partial(self._send, call), call.convert) as pieces:
            return _convert.join_files([piece async for piece in pieces])

    async def model(self, name: str = "", *, timeout: float | None = None) -> Model:
        """One model, by ``name`` or ``name@variant``; "" is the default model."""
        return await self._run(_requests.model(name, timeout))

    async def models(self, *, timeout: float | None = None) -> list[Model]:
        """All served models and variants."""
        return await self._run(_requests.models(timeout))

    async def health(self, service: str = "", *, timeout: float | None = None) -> bool:
        """Whether a service is SERVING; "" is the server as a whole."""
        return await self._run(_requests.health(service, timeout))

    async def load(self, *, timeout: float | None = None) -> Load:
        """Queue, KV cache and throughput at this moment."""
        return await self._run(_requests.load(timeout))

    def watch_startup(self, *, timeout: float | None = None) -> AsyncEventStream[StartupEvent]:
        """The server's start, until it is ready or has failed; opened by ``async with``."""
        call = _requests.watch_startup(timeout)
        return AsyncEventStream(partial(self._send, call), call.convert)

    async def _run(self, call: Call[T]) -> T:
        try:
            response = await self._send(call)
        except grpc.RpcError as error:
            raise from_rpc_error(error, request_id=call.request_id) from error
        return call.convert(response)
