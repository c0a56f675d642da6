"""``InferenceService``: adapters between the contract and the engine's front end."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from engine.client.generation import Delta, Generation
from engine.client.requests import GenerationRequest
from engine.errors import NotServed
from server import convert
from server.door import Call
from server.serving import Serving
from venturi.v1 import inference_pb2 as pb
from venturi.v1 import inference_pb2_grpc


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """One instance serves all calls."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def Generate(self, request: pb.GenerateRequest, call: Call) -> pb.GenerateResponse:
        """See the contract."""
        async with self._accepted(request, call) as generation:
            choice, response = pb.Choice(), pb.GenerateResponse()
            response.prompt_info.CopyFrom(self._prompt_info(generation, call))
            async for delta in self._deltas(generation, call):
                choice.text += delta.text
                choice.token_ids.extend(delta.token_ids if _with_ids(request) else ())
                if delta.end is not None:
                    choice.finish.CopyFrom(convert.finish(delta.end))
                    summary = convert.summary(delta.end, generation.prompt_tokens)
                    response.summary.CopyFrom(summary)
            response.choices.append(choice)
            return response

    async def GenerateStream(self, request: pb.GenerateStreamRequest, call: Call) -> None:
        """See the contract."""
        async with self._accepted(request, call) as generation:
            info: pb.PromptInfo | None = self._prompt_info(generation, call)
            async for delta in self._deltas(generation, call):
                chunks = [convert.chunk(delta, _with_ids(request))] if delta.token_ids else []
                if not chunks and delta.text:
                    chunks = [pb.Chunk(text_delta=delta.text)]
                message = pb.GenerateStreamResponse(prompt_info=info, chunks=chunks)
                if delta.end is not None:
                    message.finishes.append(convert.finish(delta.end))
                    summary = convert.summary(delta.end, generation.prompt_tokens)
                    message.summary.CopyFrom(summary)
                await call.write(message)
                info = None

    async def Tokenize(self, request: pb.TokenizeRequest, call: Call) -> pb.TokenizeResponse:
        """See the contract."""
        generator = self._serving.generator(request.model)
        special = not request.HasField("add_special_tokens") or request.add_special_tokens
        prompt = convert.chat_or_text(request)
        ids, text = await generator.tokenize(prompt, add_special=special)
        return pb.TokenizeResponse(token_ids=ids, text=text)

    async def Detokenize(self, request: pb.DetokenizeRequest, call: Call) -> pb.DetokenizeResponse:
        """See the contract."""
        generator = self._serving.generator(request.model)
        skip = not request.HasField("skip_special_tokens") or request.skip_special_tokens
        text = await generator.detokenize(list(request.token_ids), skip_special=skip)
        return pb.DetokenizeResponse(text=text)

    async def CompressPrompt(
        self, request: pb.CompressPromptRequest, call: Call
    ) -> pb.CompressPromptResponse:
        """Not served yet."""
        raise NotServed("prompt_compression", "this server does not compress prompts")

    @asynccontextmanager
    async def _accepted(
        self, request: convert.AnyGenerateRequest, call: Call
    ) -> AsyncIterator[Generation]:
        generator = self._serving.generator(request.model)
        wanted: GenerationRequest = convert.generation_request(
            request, self._serving.next_id(call.request_id), call.deadline
        )
        call.span.set(convert.span_attributes(wanted, self._serving.name))
        generation = await generator.start(wanted)
        try:
            yield generation
        finally:
            generation.close()

    async def _deltas(self, generation: Generation, call: Call) -> AsyncIterator[Delta]:
        """The generation's deltas, counted, its end recorded on the span."""
        async for delta in generation:
            self._serving.rate.add(len(delta.token_ids))
            if delta.end is not None:
                call.span.phases(delta.end)
                variant = self._serving.variant
                call.span.set(convert.end_attributes(delta.end, generation.prompt_tokens, variant))
            yield delta

    def _prompt_info(self, generation: Generation, call: Call) -> pb.PromptInfo:
        return convert.prompt_info(
            generation, call.request_id, self._serving.name, self._serving.variant
        )


def _with_ids(request: convert.AnyGenerateRequest) -> bool:
    return not request.output.HasField("return_token_ids") or request.output.return_token_ids
