"""One generation from text to text: check, tokenise, submit, detokenise, stop.

Each choice of a ``Generation`` ends with exactly one ``Delta`` that has an ``End``, or all of
them with one exception.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from engine.client.admission import Admission, Place, estimate_tokens
from engine.client.choice import TextChoice
from engine.client.defaults import GenerationDefaults
from engine.client.engine_client import EngineClient
from engine.client.requests import Chat, GenerationRequest
from engine.client.stream import Coalescing, TokenStream
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
    """Front door of the engine. ``admission`` bounds what is accepted."""

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        defaults: GenerationDefaults,
        admission: Admission,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.defaults = defaults
        self._chat_stop = defaults.chat_stop or tuple(filter(None, [tokenizer.chat_stop]))
        self._admission = admission

    @property
    def open_requests(self) -> int:
        """Accepted and not ended."""
        return self._admission.open_requests

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
        place = self._admission.enter()
        try:
            return await self._submit(request, arrival, place)
        except BaseException:
            place.leave()
            raise

    async def tokenize(
        self,
        prompt: str | Chat,
        *,
        add_special: bool = True,
        reserve: Callable[[int], None] = lambda tokens: None,
    ) -> tuple[list[int], str]:
        """Token ids, and the text that they stand for (the rendered chat).

        ``reserve`` hears how many there may be, before each costly part.
        """
        if isinstance(prompt, Chat):
            self._expect("".join(m["content"] for m in prompt.messages), reserve)
            text = await asyncio.to_thread(
                self.tokenizer.render,
                prompt.messages,
                prompt.add_generation_prompt,
                prompt.template_kwargs,
            )
            # The template prints the special tokens itself.
            add_special = False
        else:
            text = prompt
        self._expect(text, reserve)
        ids = await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special)
        return ids, text

    async def detokenize(self, ids: list[int], *, skip_special: bool = True) -> str:
        """Text of ``ids``. Raises ``InvalidRequest`` for ids that the model does not have."""
        check_ids("token_ids", ids, self.limits)
        return await asyncio.to_thread(self.tokenizer.decode, ids, skip_special_tokens=skip_special)

    def _expect(self, text: str, reserve: Callable[[int], None]) -> None:
        """Tokenising takes seconds for megabytes; what cannot fit is refused before."""
        longest = self.limits.max_sequence_tokens
        if len(text) > longest * self.tokenizer.longest_token:
            raise InvalidRequest("input", f"{len(text)} characters are more than can fit")
        reserve(min(estimate_tokens(text), longest))

    async def _submit(
        self, request: GenerationRequest, arrival: float, place: Place
    ) -> "Generation":
        ids, text = await self._prompt(request, place)
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
        # After the checks: a prompt that can never fit is not told to come again.
        place.reserve(len(ids))
        stops = request.stop
        if stops is None:
            stops = self._chat_stop if isinstance(request.prompt, Chat) else ()
        choices = [
            TextChoice(
                self.tokenizer.decode,
                core_request.stopping,
                stops,
                request.include_stop,
                text if request.echo else "",
            )
            for _ in range(request.n)
        ]
        stream = self.engine.submit(core_request)
        stream.on_start = place.start
        return Generation(
            self.engine, place, core_request, stream, choices, request.coalescing, tokenized
        )

    async def _prompt(self, request: GenerationRequest, place: Place) -> tuple[list[int], str]:
        """Token ids of the prompt, and its text where that is known or wanted."""
        prompt = request.prompt
        if not isinstance(prompt, list):
            ids, text = await self.tokenize(prompt, reserve=place.reserve)
            check_ids("input", ids, self.limits)  # a tokenizer may know more than the model
            return ids, text
        place.reserve(len(prompt))
        return prompt, await self.detokenize(prompt) if request.echo else ""


class Generation:
    """An accepted request. Iterate it to its end and ``close`` it, whatever happens."""

    def __init__(
        self,
        engine: EngineClient,
        place: Place,
        request: Request,
        stream: TokenStream,
        choices: list[TextChoice],
        coalescing: Coalescing,
        tokenized: float,
    ) -> None:
        self._engine = engine
        self._place = place
        self._request = request
        self._stream = stream
        self._choices = choices
        self._coalescing = coalescing
        self._tokenized = tokenized
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
            self._engine.cancel(self._request.id)
            self._place.leave()

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
                self._engine.cancel(self._request.id, piece.choice)
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
