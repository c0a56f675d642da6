"""One generation from text to text: check, tokenise, submit, detokenise, stop.

Each choice of a ``Generation`` ends with exactly one ``Delta`` that has an ``End``, or all of
them with one exception.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from engine.client.choice import TextChoice
from engine.client.defaults import GenerationDefaults
from engine.client.engine_client import EngineClient
from engine.client.requests import Chat, GenerationRequest
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
from engine.types import Finished, FinishReason, Request, TokenEvent, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a choice ended, and when its phases were (times of ``time.monotonic``)."""

    reason: FinishReason
    stop: str | None
    stop_token_id: int | None
    completion_tokens: int
    cached_tokens: int
    preemptions: int
    recomputed_tokens: int
    arrival: float
    tokenized: float
    scheduled: float | None
    first_token: float | None
    finished: float


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of a choice with the text that they complete; its last one has the ``end``."""

    choice: int
    text: str
    tokens: list[TokenEvent]
    end: End | None

    @property
    def token_ids(self) -> list[int]:
        """The tokens' ids."""
        return [event.token for event in self.tokens]


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
        if isinstance(prompt, list):
            ids, text = prompt, await self.detokenize(prompt) if request.echo else ""
        else:
            ids, text = await self.tokenize(prompt)
        tokenized = time.monotonic()
        timeout = request.queue_timeout
        core_request = Request(
            id=request.id,
            prompt=ids,
            sampling=sampling_params(request, self.defaults),
            stopping=stopping_params(request, self.defaults, self.limits, len(ids), arrival),
            arrival=arrival,
            choices=request.n,
            priority=request.priority,
            queue_deadline=None if timeout is None else arrival + timeout,
            cache_salt=request.id if request.bypass_cache else request.cache_salt,
        )
        stops = request.stop
        if stops is None:
            stops = self._chat_stop if isinstance(prompt, Chat) else ()
        stream = self.engine.submit(core_request)
        echo = text if request.echo else ""
        return Generation(self, core_request, stream, tokenized, request, stops, echo)


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
        echo: str = "",
    ) -> None:
        self._generator = generator
        self._request = request
        self._stream = stream
        self._tokenized = tokenized
        self._coalescing = options.coalescing
        decode = generator.tokenizer.decode
        self._choices = [
            TextChoice(decode, request.stopping, stops, options.include_stop, echo)
            for _ in range(request.choices)
        ]
        self._closed = False

    @property
    def choices(self) -> int:
        """Number of choices."""
        return len(self._choices)

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self._request.prompt)

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs]:
        """From the prompt's second token on; complete when the first token is there."""
        return self._stream.prompt

    def close(self) -> None:
        """Ends the request in the engine if it still runs. Idempotent."""
        if not self._closed:
            self._closed = True
            self._generator.engine.cancel(self._request.id)
            self._generator.release()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Deltas until each choice has had its end. Raises ``DeadlineExceeded``,
        ``Overloaded`` (refused in the queue), ``GenerationFailed``, or ``EngineUnavailable``:
        the server ended it, or the engine died before the first token."""
        running = len(self._choices)
        while running:
            piece = await self._stream.next(self._coalescing)
            choice = self._choices[piece.choice]
            text, events = choice.take(piece.tokens) if choice.matched is None else ("", [])
            if piece.finished is None and choice.matched is not None and events:
                # The end comes with the engine's word that the blocks are free.
                self._generator.engine.cancel(self._request.id, piece.choice)
            end = None
            if piece.finished is not None:
                running -= 1
                if choice.matched is None:
                    self._raise_for(piece.finished)
                    text += choice.rest()
                end = self._end(choice, piece.finished)
            if events or end is not None:
                yield Delta(piece.choice, text, events, end)

    def _raise_for(self, finished: Finished) -> None:
        reason = finished.reason
        if reason is FinishReason.DEADLINE:
            raise DeadlineExceeded("the deadline passed")
        if reason is FinishReason.REFUSED:
            raise Overloaded(finished.message, finished.retry_after_s)
        if reason is FinishReason.INVALID:
            constraint = self._request.sampling.constraint
            field = "input" if constraint is None else f"structured.{constraint.kind}"
            raise InvalidRequest(field, finished.message)
        if reason is FinishReason.CANCELLED:
            raise EngineUnavailable("the server ended the request")
        if reason is FinishReason.LOST and not any(choice.count for choice in self._choices):
            raise EngineUnavailable(finished.message)
        if reason in (FinishReason.ERROR, FinishReason.LOST):
            raise GenerationFailed(finished.message)

    def _end(self, choice: TextChoice, finished: Finished) -> End:
        matched = choice.matched
        return End(
            reason=FinishReason.STOP if matched is not None else finished.reason,
            stop=matched,
            stop_token_id=None if matched is not None else finished.stop_token_id,
            completion_tokens=choice.count,
            cached_tokens=finished.cached,
            preemptions=finished.preemptions,
            recomputed_tokens=finished.recomputed,
            arrival=self._request.arrival,
            tokenized=self._tokenized,
            scheduled=finished.scheduled_at,
            first_token=finished.first_token_at,
            finished=finished.finished_at,
        )
