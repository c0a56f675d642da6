"""A scripted server for tests of programs that use this package: real gRPC, no model.

    def test_answer() -> None:
        with FakeServer(Script(chunks=["4", "2"])) as server, Client(server.target) as client:
            assert client.generate("6 * 7 =").text == "42"

One token is one character, and its id is the character's code point.
"""

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NoReturn, Self

import grpc
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from venturi.v1 import admin_pb2, admin_pb2_grpc, inference_pb2_grpc, model_pb2, model_pb2_grpc
from venturi.v1 import inference_pb2 as pb

_MODEL = model_pb2.Model(
    name="fake",
    variant="original",
    architecture="FakeForCausalLM",
    context_length=4096,
    vocabulary_size=0x110000,
    has_chat_template=True,
    precision=model_pb2.Precision(weights="float32", activations="float32", weight_bytes=1024),
    kv_cache=model_pb2.KvCache(dtype="float32", block_size=16, blocks=256),
)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A status that is not OK, with ``google.rpc`` messages as details."""

    code: grpc.StatusCode
    message: str = ""
    details: Sequence[Message] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class Script:
    """What the server answers. It may be changed while the server runs.

    Attributes:
        chunks: Text of each message of a stream; together they are the response's text.
        delay_s: Seconds before each chunk, and before each other answer.
        finish: How the response ends.
        failure: Ends calls with this status, on every service but grpc.health.
        fail_after: Chunks that a stream sends before it fails.
        fail_times: Calls that fail before one succeeds; None: all of them.
        tokenizer_files: What ``GetTokenizer`` sends, by name, each in two pieces.
    """

    chunks: Sequence[str] = ("Hello", ",", " world")
    delay_s: float = 0.0
    finish: pb.ChoiceFinish = field(
        default_factory=lambda: pb.ChoiceFinish(reason=pb.FINISH_REASON_EOS)
    )
    failure: Failure | None = None
    fail_after: int = 0
    fail_times: int | None = None
    tokenizer_files: Mapping[str, bytes] = field(default_factory=dict)


class FakeServer:
    """The server, on a free port of 127.0.0.1 while its block runs.

    Attributes:
        target: Address for ``Client``.
        script: What it answers.
        requests: Every request message received, in order.
        metadata: The headers of each of them.
        cancelled: The requests whose call ended before the server had answered.
    """

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
        self.requests: list[Message] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.cancelled: list[Message] = []
        self._changed = threading.Condition()
        self._health = health.HealthServicer()
        self._server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
        service = _Services(self)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(service, self._server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self.set_serving(True)
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends all calls and frees the port."""
        self._server.stop(grace=None).wait()

    def set_serving(self, serving: bool, service: str = "") -> None:
        """Sets what grpc.health reports."""
        status = health_pb2.HealthCheckResponse
        self._health.set(service, status.SERVING if serving else status.NOT_SERVING)

    def wait_cancelled(self, count: int = 1, timeout_s: float = 5.0) -> bool:
        """Waits until ``count`` calls were cancelled; False when the time is over."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self.cancelled) >= count, timeout_s)

    def _begin(self, request: Message, context: grpc.ServicerContext) -> "_Rpc":
        """Records a call."""
        with self._changed:
            self.requests.append(request)
            self.metadata.append(dict(context.invocation_metadata()))
            request_id = getattr(request, "request_id", "") or f"fake-{len(self.requests)}"
        return _Rpc(self, request, context, request_id)

    def _record_cancel(self, request: Message) -> None:
        """Records that a call ended too early."""
        with self._changed:
            self.cancelled.append(request)
            self._changed.notify_all()

    def _next_failure(self) -> Failure | None:
        """The status that the present call is to fail with, if any."""
        with self._changed:
            script = self.script
            if script.fail_times is not None:
                if script.fail_times == 0:
                    return None
                script.fail_times -= 1
            return script.failure


class _Rpc:
    """One call at the server: notices its end, and answers or fails as scripted."""

    def __init__(
        self, server: FakeServer, request: Message, context: grpc.ServicerContext, request_id: str
    ) -> None:
        self.request_id = request_id
        self.failure = server._next_failure()
        self.answered = False
        self._server = server
        self._request = request
        self._context = context
        self._gone = threading.Event()
        context.set_trailing_metadata((("x-request-id", request_id),))
        context.add_callback(self._ended)

    def _ended(self) -> None:
        self._gone.set()
        if not self.answered:
            self._server._record_cancel(self._request)

    def client_left(self) -> bool:
        """Waits for the script's delay, or less when the client cancels."""
        return self._gone.wait(self._server.script.delay_s)

    def answer(self) -> None:
        """To be called before the last message is sent; fails the call when that is scripted."""
        if self.failure is not None:
            self.fail(self.failure)
        self.client_left()
        self.answered = True

    def fail(self, failure: Failure) -> NoReturn:
        """Ends the call with a status and its details."""
        self.answered = True
        status = status_pb2.Status(code=failure.code.value[0], message=failure.message)
        for detail in failure.details:
            status.details.add().Pack(detail)
        trailers = {"x-request-id": self.request_id, **failure.metadata}
        packed = ("grpc-status-details-bin", status.SerializeToString())
        self._context.set_trailing_metadata((*trailers.items(), packed))
        self._context.abort(failure.code, failure.message)


class _Services(
    inference_pb2_grpc.InferenceServiceServicer,
    model_pb2_grpc.ModelServiceServicer,
    admin_pb2_grpc.AdminServiceServicer,
):
    """All services of the contract; those that are not here answer UNIMPLEMENTED."""

    def __init__(self, server: FakeServer) -> None:
        self._server = server

    def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateStreamResponse]:
        rpc = self._server._begin(request, context)
        script = self._server.script
        prompt = _prompt_tokens(request)
        for count, text in enumerate(script.chunks):
            if rpc.failure is not None and count == script.fail_after:
                rpc.fail(rpc.failure)
            if rpc.client_left():
                return
            info = _info(rpc.request_id, prompt) if count == 0 else None
            chunk = pb.Chunk(text_delta=text, token_ids=_tokens(text))
            yield pb.GenerateStreamResponse(prompt_info=info, chunks=[chunk])
        rpc.answer()
        yield pb.GenerateStreamResponse(
            finishes=[script.finish], summary=_summary(prompt, "".join(script.chunks))
        )

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> pb.GenerateResponse:
        rpc = self._server._begin(request, context)
        rpc.answer()
        text = "".join(self._server.script.chunks)
        prompt = _prompt_tokens(request)
        finish = self._server.script.finish
        return pb.GenerateResponse(
            prompt_info=_info(rpc.request_id, prompt),
            choices=[pb.Choice(text=text, token_ids=_tokens(text), finish=finish)],
            summary=_summary(prompt, text),
        )

    def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.ServicerContext
    ) -> pb.TokenizeResponse:
        self._server._begin(request, context).answer()
        text = _prompt_text(request)
        return pb.TokenizeResponse(token_ids=_tokens(text), text=text)

    def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.ServicerContext
    ) -> pb.DetokenizeResponse:
        self._server._begin(request, context).answer()
        return pb.DetokenizeResponse(text="".join(map(chr, request.token_ids)))

    def GetModel(
        self, request: model_pb2.GetModelRequest, context: grpc.ServicerContext
    ) -> model_pb2.GetModelResponse:
        rpc = self._server._begin(request, context)
        if request.model not in ("", "fake", "fake@original"):
            rpc.fail(Failure(code=grpc.StatusCode.NOT_FOUND, message="unknown model"))
        rpc.answer()
        return model_pb2.GetModelResponse(model=_MODEL)

    def GetTokenizer(
        self, request: model_pb2.GetTokenizerRequest, context: grpc.ServicerContext
    ) -> Iterator[model_pb2.GetTokenizerResponse]:
        self._server._begin(request, context).answer()
        for name, data in self._server.script.tokenizer_files.items():
            checksum = hashlib.sha256(data).hexdigest()
            half = len(data) // 2
            for part in (data[:half], data[half:]):
                yield model_pb2.GetTokenizerResponse(
                    file_name=name, data=part, total_bytes=len(data), sha256=checksum
                )

    def ListModels(
        self, request: model_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> model_pb2.ListModelsResponse:
        self._server._begin(request, context).answer()
        return model_pb2.ListModelsResponse(models=[_MODEL])

    def GetLoad(
        self, request: admin_pb2.GetLoadRequest, context: grpc.ServicerContext
    ) -> admin_pb2.GetLoadResponse:
        self._server._begin(request, context).answer()
        return admin_pb2.GetLoadResponse(running=1, kv_blocks_free=256, tokens_per_second=12.5)

    def WatchStartup(
        self, request: admin_pb2.WatchStartupRequest, context: grpc.ServicerContext
    ) -> Iterator[admin_pb2.WatchStartupResponse]:
        rpc = self._server._begin(request, context)
        loading = admin_pb2.WatchStartupResponse(phase=admin_pb2.PHASE_LOADING, item=1, items=2)
        loading.time_left.FromMilliseconds(1500)
        yield loading
        rpc.answer()
        yield admin_pb2.WatchStartupResponse(phase=admin_pb2.PHASE_READY)


def _tokens(text: str) -> list[int]:
    return [ord(character) for character in text]


def _prompt_text(
    request: pb.GenerateRequest | pb.GenerateStreamRequest | pb.TokenizeRequest,
) -> str:
    if request.HasField("chat"):
        return "".join(f"{each.role}: {each.content}\n" for each in request.chat.messages)
    return request.text


def _prompt_tokens(request: pb.GenerateRequest | pb.GenerateStreamRequest) -> list[int]:
    return list(request.token_ids.ids) or _tokens(_prompt_text(request))


def _info(request_id: str, prompt: list[int]) -> pb.PromptInfo:
    return pb.PromptInfo(
        request_id=request_id, model="fake", variant="original", prompt_tokens=len(prompt)
    )


def _summary(prompt: list[int], text: str) -> pb.Summary:
    summary = pb.Summary(usage=pb.Usage(prompt_tokens=len(prompt), completion_tokens=len(text)))
    summary.timings.ttft.FromMilliseconds(20)
    summary.timings.tpot.FromMilliseconds(10)
    return summary
