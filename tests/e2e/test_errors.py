"""Bad requests: the exact code and field, and nothing of the inside."""

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from venturi.v1 import admin_pb2, model_pb2
from venturi.v1 import inference_pb2 as pb
from venturi.v1.admin_pb2_grpc import AdminServiceStub
from venturi.v1.inference_pb2_grpc import InferenceServiceStub
from venturi.v1.model_pb2_grpc import ModelServiceStub

NAN, INF = float("nan"), float("inf")
MESSAGES = [pb.ChatMessage(role="user", content="hi")]
INVALID = {
    "input": pb.GenerateRequest(),
    "sampling.temperature": pb.GenerateRequest(text="x", sampling=pb.Sampling(temperature=NAN)),
    "sampling.top_p": pb.GenerateRequest(text="x", sampling=pb.Sampling(top_p=0)),
    "sampling.top_k": pb.GenerateRequest(text="x", sampling=pb.Sampling(top_k=4_000_000_000)),
    "stopping.max_tokens": pb.GenerateRequest(text="x", stopping=pb.Stopping(max_tokens=0)),
    "stopping.stop": pb.GenerateRequest(text="x", stopping=pb.Stopping(stop=[""])),
    "stopping.stop_token_ids": pb.GenerateRequest(
        text="x", stopping=pb.Stopping(stop_token_ids=[4096])
    ),
    "token_ids": pb.GenerateRequest(token_ids=pb.TokenIds(ids=[4_294_967_295])),
    "request_id": pb.GenerateRequest(text="x", request_id="a\nb"),
    "chat.messages": pb.GenerateRequest(chat=pb.Chat()),
    "chat.template_kwargs": pb.GenerateRequest(
        chat=pb.Chat(messages=MESSAGES, template_kwargs="[1]")
    ),
}
MORE_INVALID = [
    ("sampling.temperature", pb.GenerateRequest(text="x", sampling=pb.Sampling(temperature=-1))),
    ("sampling.temperature", pb.GenerateRequest(text="x", sampling=pb.Sampling(temperature=INF))),
    ("sampling.top_p", pb.GenerateRequest(text="x", sampling=pb.Sampling(top_p=1.5))),
    ("stopping.max_tokens", pb.GenerateRequest(text="x", stopping=pb.Stopping(max_tokens=10**6))),
    ("stopping.stop", pb.GenerateRequest(text="x", stopping=pb.Stopping(stop=["a"] * 99))),
    ("stopping.stop", pb.GenerateRequest(text="x", stopping=pb.Stopping(stop=["a" * 999]))),
    ("stopping.max_duration", pb.GenerateRequest(text="x", stopping={"max_duration": {}})),
    (
        "stopping.max_duration",
        pb.GenerateRequest(text="x", stopping={"max_duration": {"seconds": -5}}),
    ),
    ("sampling.min_p", pb.GenerateRequest(text="x", sampling=pb.Sampling(min_p=NAN))),
    (
        "sampling.repetition_penalty",
        pb.GenerateRequest(text="x", sampling=pb.Sampling(repetition_penalty=0)),
    ),
    (
        "sampling.presence_penalty",
        pb.GenerateRequest(text="x", sampling=pb.Sampling(presence_penalty=INF)),
    ),
    (
        "sampling.logit_bias",
        pb.GenerateRequest(text="x", sampling=pb.Sampling(logit_bias={4096: 1.0})),
    ),
    ("output.logprobs", pb.GenerateRequest(text="x", output=pb.OutputOptions(logprobs=21))),
    (
        "stopping.min_tokens",
        pb.GenerateRequest(text="x", stopping=pb.Stopping(min_tokens=3, max_tokens=2)),
    ),
    (
        "stopping.ignore_eos",
        pb.GenerateRequest(text="x", structured={"regex": "a"}, stopping={"ignore_eos": True}),
    ),
    ("structured.choice", pb.GenerateRequest(text="x", structured={"choice": {}})),
    ("structured.regex", pb.GenerateRequest(text="x", structured={"regex": "(((("})),
    ("structured.regex", pb.GenerateRequest(text="x", structured={"regex": ""})),
    ("structured.grammar", pb.GenerateRequest(text="x", structured={"grammar": "start: x"})),
    ("structured.json_schema", pb.GenerateRequest(text="x", structured={"json_schema": "{"})),
    (
        "structured.json_schema",
        pb.GenerateRequest(text="x", structured={"json_schema": '{"a":' * 5000 + "1" + "}" * 5000}),
    ),
    (
        "structured.json_schema",
        pb.GenerateRequest(text="x", structured={"json_schema": " " * 100_000}),
    ),
    ("input", pb.GenerateRequest(text="")),
    ("input", pb.GenerateRequest(text="word " * 5000)),
    ("input", pb.GenerateRequest(token_ids=pb.TokenIds())),
    (
        "chat.template_kwargs",
        pb.GenerateRequest(chat=pb.Chat(messages=MESSAGES, template_kwargs="[" * 100_000)),
    ),
    (
        "chat.template_kwargs",
        pb.GenerateRequest(chat=pb.Chat(messages=MESSAGES, template_kwargs='{"messages": 1}')),
    ),
]
UNSERVED = {
    "prompt_compression.mode": pb.GenerateRequest(
        text="x", prompt_compression=pb.PromptCompression(mode=pb.PromptCompression.MODE_ON)
    ),
    "prompt_compression.keep_ratio": pb.GenerateRequest(
        text="x", prompt_compression=pb.PromptCompression(keep_ratio=0.5)
    ),
}
NEUTRAL = pb.GenerateRequest(
    text="x",
    sampling=pb.Sampling(n=1, min_p=0, repetition_penalty=1),
    stopping=pb.Stopping(max_tokens=1, min_tokens=0),
    prompt_compression=pb.PromptCompression(mode=pb.PromptCompression.MODE_OFF),
    cache=pb.CacheOptions(salt="tenant", bypass_prefix_cache=True),
)


def fail(channel: grpc.Channel, request: pb.GenerateRequest) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        InferenceServiceStub(channel).Generate(request)
    return caught.value


def detail(error: grpc.RpcError, kind: type[Message]) -> Message | None:
    trailers = dict(error.trailing_metadata())
    for packed in status_pb2.Status.FromString(trailers["grpc-status-details-bin"]).details:
        message = kind()
        if packed.Unpack(message):
            return message
    return None


@pytest.mark.parametrize(("field", "request_"), [*INVALID.items(), *MORE_INVALID])
def test_a_bad_parameter_is_named(
    channel: grpc.Channel, field: str, request_: pb.GenerateRequest
) -> None:
    error = fail(channel, request_)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error.details()
    bad = detail(error, error_details_pb2.BadRequest)
    assert [violation.field for violation in bad.field_violations] == [field]
    assert error.details().startswith(field)


@pytest.mark.parametrize(("field", "request_"), UNSERVED.items())
def test_what_is_not_served_is_refused_by_its_path(
    channel: grpc.Channel, field: str, request_: pb.GenerateRequest
) -> None:
    error = fail(channel, request_)
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert error.details().startswith(field)


def test_values_that_change_nothing_are_accepted(channel: grpc.Channel) -> None:
    assert InferenceServiceStub(channel).Generate(NEUTRAL).summary.usage.completion_tokens == 1


def test_a_stream_is_refused_like_a_unary(channel: grpc.Channel) -> None:
    request = pb.GenerateStreamRequest(text="x", sampling=pb.Sampling(top_p=2))
    with pytest.raises(grpc.RpcError) as caught:
        list(InferenceServiceStub(channel).GenerateStream(request))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    options = pb.StreamOptions(max_tokens_per_message=0)
    with pytest.raises(grpc.RpcError) as caught:
        list(
            InferenceServiceStub(channel).GenerateStream(
                pb.GenerateStreamRequest(text="x", stream=options)
            )
        )
    assert "stream.max_tokens_per_message" in caught.value.details()


def test_an_unknown_model_is_not_found(channel: grpc.Channel) -> None:
    for name in ("gpt", "venturi-mini@w4a16", "@w8a8"):
        error = fail(channel, pb.GenerateRequest(text="x", model=name))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert detail(error, error_details_pb2.ResourceInfo).resource_name == name
    with pytest.raises(grpc.RpcError) as caught:
        ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest(model="gpt"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    for name in ("", "venturi-mini", "venturi-mini@w8a8"):
        ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest(model=name))


def test_rpcs_of_later_are_unimplemented(channel: grpc.Channel) -> None:
    for call in (
        lambda: InferenceServiceStub(channel).CompressPrompt(pb.CompressPromptRequest(text="x")),
        lambda: AdminServiceStub(channel).SetTraffic(admin_pb2.SetTrafficRequest()),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_each_answer_has_its_request_id(channel: grpc.Channel) -> None:
    error = fail(channel, pb.GenerateRequest(request_id="trace-me"))
    assert dict(error.trailing_metadata())["x-request-id"] == "trace-me"
    assert detail(error, error_details_pb2.RequestInfo).request_id == "trace-me"
    request = pb.GenerateRequest(text="x", stopping=pb.Stopping(max_tokens=1))
    response, call = InferenceServiceStub(channel).Generate.with_call(request)
    trailers = dict(call.trailing_metadata())
    assert trailers["x-request-id"] == response.prompt_info.request_id != ""


def test_two_requests_may_share_an_id(channel: grpc.Channel) -> None:
    request = pb.GenerateRequest(
        text="x", request_id="same", stopping=pb.Stopping(max_tokens=20, ignore_eos=True)
    )
    futures = [InferenceServiceStub(channel).Generate.future(request) for _ in range(2)]
    assert {f.result().summary.usage.completion_tokens for f in futures} == {20}


def test_detokenize_refuses_ids_outside_of_the_vocabulary(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        InferenceServiceStub(channel).Detokenize(pb.DetokenizeRequest(token_ids=[10**6]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_garbage_bytes_do_not_hurt(channel: grpc.Channel) -> None:
    raw = channel.unary_unary("/venturi.v1.InferenceService/Generate")
    with pytest.raises(grpc.RpcError):
        raw(b"\xff\xff\xff\xff garbage")
    assert InferenceServiceStub(channel).Generate(NEUTRAL).choices[0].token_ids


def test_a_message_over_the_limit_is_refused(channel: grpc.Channel) -> None:
    error = fail(channel, pb.GenerateRequest(text="x" * (5 << 20)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
