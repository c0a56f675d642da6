"""Every method of both clients, over real gRPC."""

import asyncio
import inspect

import pytest

from venturi import AsyncClient, Client, FinishReason, Phase, VenturiError
from venturi._channel import service_config
from venturi._convert import join_files
from venturi.testing import FakeServer
from venturi.v1 import inference_pb2 as pb
from venturi.v1.model_pb2 import GetTokenizerResponse


def test_generate_returns_the_whole_response(client: Client, server: FakeServer) -> None:
    server.script.finish = pb.ChoiceFinish(reason=pb.FINISH_REASON_STOP, stop="!")
    result = client.generate("abc", request_id="mine")
    assert result.text == "Hello, world"
    assert result.token_ids == tuple(map(ord, "Hello, world"))
    assert (result.finish_reason, result.matched_stop) == (FinishReason.STOP, "!")
    assert (result.request_id, result.model, result.variant) == ("mine", "fake", "original")
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (3, 12)
    assert result.timings.ttft_s == pytest.approx(0.02)


def test_the_other_methods(client: Client, server: FakeServer) -> None:
    tokens = client.tokenize("hi")
    assert (tokens.token_ids, tokens.text) == ((104, 105), "hi")
    assert client.detokenize(tokens.token_ids) == "hi"
    assert client.tokenize([{"role": "user", "content": "hi"}]).text == "user: hi\n"
    server.script.tokenizer_files = {"tokenizer.json": b"{...}", "empty": b""}
    assert client.tokenizer_files() == server.script.tokenizer_files
    assert client.model("fake@original").context_length == 4096
    assert [model.name for model in client.models()] == ["fake"]
    assert client.load().tokens_per_second == 12.5
    assert client.health()
    server.set_serving(False)
    assert not client.health()
    with client.watch_startup() as events:
        seen = [(event.phase, event.time_left_s) for event in events]
    assert seen == [(Phase.LOADING, 1.5), (Phase.READY, None)]


async def test_the_async_client_does_the_same(
    async_client: AsyncClient, client: Client, server: FakeServer
) -> None:
    expected = client.generate("abc", request_id="mine")
    assert await async_client.generate("abc", request_id="mine") == expected
    assert await async_client.tokenize("hi") == client.tokenize("hi")
    assert await async_client.detokenize([104, 105]) == "hi"
    server.script.tokenizer_files = {"tokenizer.json": b"{...}"}
    assert await async_client.tokenizer_files() == client.tokenizer_files()
    assert await async_client.model() == client.model()
    assert await async_client.models() == client.models()
    assert await async_client.load() == client.load()
    assert await async_client.health()
    async with async_client.watch_startup() as events:
        assert [event.phase async for event in events] == [Phase.LOADING, Phase.READY]


def test_chat_options_are_for_messages(client: Client, server: FakeServer) -> None:
    client.tokenize(
        [{"role": "user", "content": "hi"}],
        add_generation_prompt=False,
        template_kwargs={"enable_thinking": True},
    )
    chat = server.requests[-1].chat
    assert (chat.add_generation_prompt, chat.template_kwargs) == (
        False,
        '{"enable_thinking": true}',
    )
    with pytest.raises(ValueError, match="add_generation_prompt is for a prompt of messages"):
        client.tokenize("hi", add_generation_prompt=False)


def test_a_damaged_file_is_told() -> None:
    piece = GetTokenizerResponse(file_name="tokenizer.json", data=b"x", sha256="0" * 64)
    with pytest.raises(VenturiError, match=r"tokenizer\.json arrived damaged"):
        join_files([piece])


def test_both_clients_have_the_same_methods() -> None:
    def signatures(cls: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(member).parameters)
            for name, member in vars(cls).items()
            if inspect.isfunction(member) and not name.startswith("_")
        }

    assert signatures(Client) == signatures(AsyncClient)


def test_the_target_comes_from_the_argument_the_environment_or_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("VENTURI_TARGET", raising=False)
    assert Client().target == "127.0.0.1:50051"
    monkeypatch.setenv("VENTURI_TARGET", "there:1")
    assert Client().target == "there:1"
    assert repr(Client("here:2")) == "<Client here:2>"


def test_a_closed_client_says_so(server: FakeServer) -> None:
    with Client(server.target) as client:
        client.health()
    with pytest.raises(RuntimeError, match="client is closed"):
        client.health()


def test_metadata_goes_with_each_call(server: FakeServer) -> None:
    with Client(server.target, metadata={"Authorization": "Bearer key", "a": "1"}) as client:
        client.generate("x", metadata={"a": "2", "traceparent": "00-1-2-01"})
    sent = server.metadata[0]
    assert (sent["authorization"], sent["a"]) == ("Bearer key", "2")
    assert sent["traceparent"] == "00-1-2-01"


def test_an_active_span_is_propagated(client: Client, server: FakeServer) -> None:
    trace = pytest.importorskip("opentelemetry.trace")
    context = trace.SpanContext(0xAB, 0xCD, is_remote=False, trace_flags=trace.TraceFlags(1))
    with trace.use_span(trace.NonRecordingSpan(context)):
        client.generate("x")
    client.generate("x")
    assert server.metadata[0]["traceparent"] == f"00-{0xAB:032x}-{0xCD:016x}-01"
    assert "traceparent" not in server.metadata[1]


def test_retries_are_configured_within_what_grpc_allows() -> None:
    assert "methodConfig" not in service_config(0)
    assert "'maxAttempts': 3" in str(service_config(2))
    assert "'maxAttempts': 5" in str(service_config(9))
    with pytest.raises(ValueError, match="max_retries is -1"):
        service_config(-1)


async def test_async_calls_run_at_the_same_time(
    async_client: AsyncClient, server: FakeServer
) -> None:
    server.script.delay_s = 0.2
    start = asyncio.get_running_loop().time()
    await asyncio.gather(*(async_client.generate("x") for _ in range(4)))
    assert asyncio.get_running_loop().time() - start < 0.7
