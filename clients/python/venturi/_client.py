"""The synchronous client."""

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
from venturi._stream import EventStream, TextStream
from venturi._types import Generation, Load, Model, StartupEvent, Tokenization

T = TypeVar("T")


class Client(BaseClient):
    """A client of the service; threads may share it, forked processes may not.

    Every method raises a ``VenturiError`` when its call fails.
    """

    _transport = grpc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; calls that still run are cancelled."""
        self._closed = True
        if self._channel is not None:
            self._channel.close()

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Runs a prompt (text, token ids or messages) and returns the whole response."""
        return self._run(_requests.generate(prompt, options))

    def stream(self, prompt: Prompt, **options: Unpack[StreamOptions]) -> TextStream:
        """The response as it is made: ``with client.stream(prompt) as stream: ...``.

        Leaving the block cancels what is left. Iterating gives ``Chunk``s; an error in the
        middle carries the text so far in ``partial``.
        """
        collector = Collector(options.get("request_id") or "")
        call = _requests.stream(prompt, options, collector.add)
        return TextStream(partial(self._send, call), call.convert, collector)

    def tokenize(
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
        return self._run(_requests.tokenize(prompt, model, add_special_tokens, chat, timeout))

    def detokenize(
        self,
        token_ids: Iterable[int],
        *,
        model: str = "",
        skip_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> str:
        """Text of token ids."""
        return self._run(_requests.detokenize(token_ids, model, skip_special_tokens, timeout))

    def tokenizer_files(self, model: str = "", *, timeout: float | None = None) -> dict[str, bytes]:
        """The files of the model's tokenizer, by name: ``tokenizer.json`` and others."""
        call = _requests.tokenizer_files(model, timeout)
        with EventStream(partial(self._send, call), call.convert) as pieces:
            return _convert.join_files(pieces)

    def model(self, name: str = "", *, timeout: float | None = None) -> Model:
        """One model, by ``name`` or ``name@variant``; "" is the default model."""
        return self._run(_requests.model(name, timeout))

    def models(self, *, timeout: float | None = None) -> list[Model]:
        """All served models and variants."""
        return self._run(_requests.models(timeout))

    def health(self, service: str = "", *, timeout: float | None = None) -> bool:
        """Whether a service is SERVING; "" is the server as a whole."""
        return self._run(_requests.health(service, timeout))

    def load(self, *, timeout: float | None = None) -> Load:
        """Queue, KV cache and throughput at this moment."""
        return self._run(_requests.load(timeout))

    def watch_startup(self, *, timeout: float | None = None) -> EventStream[StartupEvent]:
        """The server's start, until it is ready or has failed; opened by ``with``."""
        call = _requests.watch_startup(timeout)
        return EventStream(partial(self._send, call), call.convert)

    def _run(self, call: Call[T]) -> T:
        try:
            response = self._send(call)
        except grpc.RpcError as error:
            raise from_rpc_error(error, request_id=call.request_id) from error
        return call.convert(response)
