"""One generation from text to text: check, tokenise, submit, detokenise, stop.

A ``Generation`` ends with exactly one ``Delta`` that has an ``End``, or with one exception.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from engine.client.defaults import GenerationDefaults
from engine.client.detokenizer import IncrementalDetokenizer
from engine.client.engine_client import EngineClient
from engine.client.requests import Chat, GenerationRequest
from engine.client.stop_strings import StopMatcher
from engine.client.stream import TokenStream
from engine.client.tokenizer import Tokenizer
from engine.client.validation import Limits, check, check_ids, sampling_params, stopping_params
from engine.errors import (
    DeadlineExceeded,
    EngineUnavailable,
    GenerationFailed,
    InvalidRequest,
    Overloaded,
)
from engine.types import Finished, FinishReason, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a generation ended, and when its phases were (times of ``time.monotonic``)."""

    reason: FinishReason
    stop: str | None
    stop_token_id: int | None
    completion_tokens: int
    preemptions: int
    arrival: float
    tokenized: float
    scheduled: float | None
    first_token: float | None
    finished: float


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens with the text that they complete; ``end`` is set in the last one."""

    text: str
    token_ids: list[int]
    end: End | None


class Generator:
    """Front door of the engine. ``max_open`` bounds the accepted requests."""

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        defaults: GenerationDefaults,
        max_open: int,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.defaults = defaults
        self._chat_stop = defaults.chat_stop or tuple(filter(None, [tokenizer.chat_stop]))
        self._max_open = max_open
        self._open = 0

    @property
    def open_requests(self) -> int:
        """Accepted and not ended."""
        return self._open

    @property
    def limits(self) -> Limits:
        """Of the served model. Raises ``EngineUnavailable`` before it is loaded."""
        if self.engine.report is None:
            raise EngineUnavailable("the model is not loaded yet")
        return Limits.of(self.engine.report)

    async def start(self, request: GenerationRequest) -> "Generation":
        """Accepts a request, or raises. The caller must ``close`` what it gets."""
        arrival = time.monotonic()
        check(request, self.limits)
        # The place is taken before the costly part, so that a burst is refused early.
        if self._open >= self._max_open:
            raise Overloaded(f"{self._open} requests are open already", retry_after_s=1.0)
        self._open += 1
        try:
            return await self._submit(request, arrival)
        except BaseException:
            self._open -= 1
            raise

    def release(self) -> None:
        """Gives a place back; called by ``Generation.close``."""
        self._open -= 1

    async def tokenize(
        self, prompt: str | Chat, *, add_special: bool = True
    ) -> tuple[list[int], str]:
        """Token ids, and the text that they stand for (the rendered chat)."""
        return await asyncio.to_thread(self._tokenize, prompt, add_special)

    async def detokenize(self, ids: list[int], *, skip_special: bool = True) -> str:
        """Text of ``ids``. Raises ``InvalidRequest`` for ids that the model does not have."""
        check_ids("token_ids", ids, self.limits)
        return await asyncio.to_thread(self.tokenizer.decode, ids, skip_special_tokens=skip_special)

    def _tokenize(self, prompt: str | Chat, add_special: bool) -> tuple[list[int], str]:
        self._refuse_long(prompt)
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, add_special_tokens=add_special), prompt
        text = self.tokenizer.render(
            prompt.messages, prompt.add_generation_prompt, prompt.template_kwargs
        )
        # The template prints the special tokens itself.
        return self.tokenizer.encode(text, add_special_tokens=False), text

    def _refuse_long(self, prompt: str | Chat) -> None:
        """Tokenising takes seconds for megabytes; what cannot fit is refused before."""
        texts = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt.messages]
        most = self.limits.max_sequence_tokens * self.tokenizer.longest_token
        if (characters := sum(map(len, texts))) > most:
            raise InvalidRequest("input", f"{characters} characters are more than can fit")

    async def _submit(self, request: GenerationRequest, arrival: float) -> "Generation":
        prompt = request.prompt
        ids = prompt if isinstance(prompt, list) else (await self.tokenize(prompt))[0]
        tokenized = time.monotonic()
        core_request = Request(
            id=request.id,
            prompt=ids,
            sampling=sampling_params(request, self.defaults),
            stopping=stopping_params(request, self.defaults, self.limits, len(ids), arrival),
            arrival=arrival,
        )
        stops = request.stop
        if stops is None:
            stops = self._chat_stop if isinstance(prompt, Chat) else ()
        stream = self.engine.submit(core_request)
        return Generation(self, core_request, stream, tokenized, request, stops)


class Generation:
    """An accepted request. Iterate it to its end and ``close`` it, whatever happens."""

    def __init__(
        self,
        generator: Generator,
        request: Request,
        stream: TokenStream,
        tokenized: float,
        options: GenerationRequest,
        stops: tuple[str, ...],
    ) -> None:
        self._generator = generator
        self._request = request
        self._stream = stream
        self._tokenized = tokenized
        self._coalescing = options.coalescing
        self._include_stop = options.include_stop
        self._detokenizer = IncrementalDetokenizer(generator.tokenizer.decode)
        self._matcher = StopMatcher(stops, options.include_stop)
        self._matched: str | None = None
        self._count = 0
        self._closed = False

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self._request.prompt)

    def close(self) -> None:
        """Ends the request in the engine if it still runs. Idempotent."""
        if not self._closed:
            self._closed = True
            self._generator.engine.cancel(self._request.id)
            self._generator.release()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Deltas to the end. Raises ``DeadlineExceeded``, ``GenerationFailed``, or
        ``EngineUnavailable``: the server ended it, or the engine died before the first token."""
        finished: Finished | None = None
        while finished is None:
            piece = await self._stream.next(self._coalescing)
            text, tokens = self._take(piece.tokens)
            finished = piece.finished
            if self._matched is not None:
                finished = finished or await self._cancelled()
            elif finished is not None:
                self._raise_for(finished)
                text += self._rest()
            if tokens or finished is not None:
                yield Delta(text, tokens, None if finished is None else self._end(finished))

    def _take(self, tokens: list[int]) -> tuple[str, list[int]]:
        """Text and tokens up to the first stop string."""
        text = ""
        for count, token in enumerate(tokens, 1):
            self._count += 1
            safe, self._matched = self._matcher.add(self._piece(token))
            text += safe
            if self._matched is not None:
                return text, tokens[:count]
        return text, tokens

    def _piece(self, token: int) -> str:
        stopping = self._request.stopping
        if token not in (*stopping.stop_token_ids, *stopping.eos_token_ids):
            return self._detokenizer.add([token])
        if not self._include_stop:
            return ""
        # It may be a special token, which the text does not show otherwise.
        return self._generator.tokenizer.decode([token], skip_special_tokens=False)

    def _rest(self) -> str:
        """Text that waited for more: an unfinished character, the start of a stop string."""
        safe, self._matched = self._matcher.add(self._detokenizer.flush())
        return safe if self._matched is not None else safe + self._matcher.flush()

    async def _cancelled(self) -> Finished:
        """Ends the engine's part after a stop string; once it is back its blocks are free."""
        self._generator.engine.cancel(self._request.id)
        while (finished := (await self._stream.next(self._coalescing)).finished) is None:
            pass
        return finished

    def _raise_for(self, finished: Finished) -> None:
        if finished.reason is FinishReason.DEADLINE:
            raise DeadlineExceeded("the deadline passed")
        if finished.reason is FinishReason.CANCELLED:
            raise EngineUnavailable("the server ended the request")
        if finished.reason is FinishReason.LOST and self._count == 0:
            raise EngineUnavailable(finished.message)
        if finished.reason in (FinishReason.ERROR, FinishReason.LOST):
            raise GenerationFailed(finished.message)

    def _end(self, finished: Finished) -> End:
        return End(
            reason=FinishReason.STOP if self._matched is not None else finished.reason,
            stop=self._matched,
            stop_token_id=finished.stop_token_id,
            completion_tokens=self._count,
            preemptions=finished.preemptions,
            arrival=self._request.arrival,
            tokenized=self._tokenized,
            scheduled=finished.scheduled_at,
            first_token=finished.first_token_at,
            finished=finished.finished_at,
        )
