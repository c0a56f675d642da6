"""``InferenceService``: adapters between the contract and the engine's front end."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from engine.client.generation import Delta, End, Generation
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
            response = pb.GenerateResponse()
            choices: dict[int, pb.Choice] = {}
            async for message in self._messages(generation, request, call):
                response.prompt_info.MergeFrom(message.prompt_info)
                response.summary.MergeFrom(message.summary)
                for chunk in message.chunks:
                    choice = choices.setdefault(chunk.index, pb.Choice(index=chunk.index))
                    choice.text += chunk.text_delta
                    choice.token_ids.extend(chunk.token_ids)
                    choice.logprobs.extend(chunk.logprobs)
                for finish in message.finishes:
                    choice = choices.setdefault(finish.index, pb.Choice(index=finish.index))
                    choice.finish.CopyFrom(finish)
            response.choices.extend(choices[index] for index in sorted(choices))
            return response

    async def GenerateStream(self, request: pb.GenerateStreamRequest, call: Call) -> None:
        """See the contract."""
        async with self._accepted(request, call) as generation:
            async for message in self._messages(generation, request, call):
                await call.write(message)

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

    async def _messages(
        self, generation: Generation, request: convert.AnyGenerateRequest, call: Call
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """The generation as messages of the contract; the last one has the summary."""
        ends: dict[int, End] = {}
        first = True
        async for delta in generation:
            self._serving.rate.add(len(delta.tokens))
            message = pb.GenerateStreamResponse()
            if first:
                first = False
                message.prompt_info.CopyFrom(self._prompt_info(generation, delta, call))
            if delta.tokens or delta.text:
                message.chunks.append(convert.chunk(delta, _with_ids(request)))
            if delta.end is not None:
                ends[delta.choice] = delta.end
                message.finishes.append(convert.finish(delta.end, delta.choice))
            if len(ends) == generation.choices:
                in_order = [ends[index] for index in sorted(ends)]
                message.summary.CopyFrom(convert.summary(in_order, generation.prompt_tokens))
                self._record(generation, convert.overall(in_order), call)
            yield message

    def _record(self, generation: Generation, end: End, call: Call) -> None:
        call.span.phases(end)
        variant = self._serving.variant
        call.span.set(convert.end_attributes(end, generation.prompt_tokens, variant))

    def _prompt_info(self, generation: Generation, delta: Delta, call: Call) -> pb.PromptInfo:
        serving = self._serving
        return convert.prompt_info(
            generation, delta, call.request_id, serving.name, serving.variant
        )


def _with_ids(request: convert.AnyGenerateRequest) -> bool:
    return not request.output.HasField("return_token_ids") or request.output.return_token_ids
