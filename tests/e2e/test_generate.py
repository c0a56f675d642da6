"""Generation through real gRPC, from the INT8 artefact of the embedded model."""

import grpc
import pytest

from server.testing import ServerProcess
from venturi import Client
from venturi.v1 import inference_pb2 as pb
from venturi.v1 import model_pb2
from venturi.v1.admin_pb2 import GetLoadRequest
from venturi.v1.admin_pb2_grpc import AdminServiceStub
from venturi.v1.inference_pb2_grpc import InferenceServiceStub
from venturi.v1.model_pb2_grpc import ModelServiceStub

PROMPT = "User: I would like to find a restaurant in San Jose."


def request(**changes: object) -> pb.GenerateStreamRequest:
    fields: dict[str, object] = {"text": PROMPT, "stopping": pb.Stopping(max_tokens=24)}
    return pb.GenerateStreamRequest(**{**fields, **changes})


def stream(channel: grpc.Channel, **changes: object) -> list[pb.GenerateStreamResponse]:
    return list(InferenceServiceStub(channel).GenerateStream(request(**changes)))


def text_of(messages: list[pb.GenerateStreamResponse]) -> str:
    return "".join(chunk.text_delta for message in messages for chunk in message.chunks)


def ids_of(messages: list[pb.GenerateStreamResponse]) -> list[int]:
    return [token for m in messages for chunk in m.chunks for token in chunk.token_ids]


def test_streams_sensible_text_token_by_token(channel: grpc.Channel) -> None:
    messages = stream(channel, stream=pb.StreamOptions(max_tokens_per_message=1))
    assert "Assistant:" in text_of(messages)
    assert len(messages) >= 24
    assert len(ids_of(messages)) == 24


def test_first_message_has_the_prompt_info_and_last_the_summary(channel: grpc.Channel) -> None:
    messages = stream(channel, request_id="mine")
    info = messages[0].prompt_info
    assert (info.request_id, info.model, info.variant) == ("mine", "venturi-mini", "w8a8")
    assert info.prompt_tokens == 13
    assert [m.HasField("prompt_info") for m in messages[1:]] == [False] * (len(messages) - 1)
    assert [m.HasField("summary") for m in messages[:-1]] == [False] * (len(messages) - 1)
    assert messages[-1].finishes[0].reason == pb.FINISH_REASON_LENGTH
    usage, timings = messages[-1].summary.usage, messages[-1].summary.timings
    assert (usage.prompt_tokens, usage.completion_tokens) == (13, 24)
    for name in ("queue", "tokenize", "prefill", "decode", "ttft", "tpot"):
        assert getattr(timings, name).ToNanoseconds() > 0, name


def test_unary_equals_stream_with_any_coalescing(channel: grpc.Channel) -> None:
    unary = InferenceServiceStub(channel).Generate(
        pb.GenerateRequest(text=PROMPT, stopping=pb.Stopping(max_tokens=24))
    )
    for options in (
        pb.StreamOptions(),
        pb.StreamOptions(max_tokens_per_message=1),
        pb.StreamOptions(max_tokens_per_message=7, max_delay={"nanos": 50_000_000}),
    ):
        messages = stream(channel, stream=options)
        assert text_of(messages) == unary.choices[0].text
        assert ids_of(messages) == list(unary.choices[0].token_ids)
        if options.max_tokens_per_message:
            sizes = [len(c.token_ids) for m in messages for c in m.chunks]
            assert max(sizes) <= options.max_tokens_per_message


def test_token_ids_give_what_their_text_gives(channel: grpc.Channel) -> None:
    stub = InferenceServiceStub(channel)
    ids = stub.Tokenize(pb.TokenizeRequest(text=PROMPT)).token_ids
    assert stub.Detokenize(pb.DetokenizeRequest(token_ids=ids)).text == PROMPT
    by_ids = request(token_ids=pb.TokenIds(ids=ids))
    assert text_of(list(stub.GenerateStream(by_ids))) == text_of(stream(channel))


def test_chat_goes_through_the_template_and_stops_at_the_next_turn(channel: grpc.Channel) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="Find me a restaurant.")])
    stub = InferenceServiceStub(channel)
    rendered = stub.Tokenize(pb.TokenizeRequest(chat=chat))
    assert rendered.text == "User: Find me a restaurant.\nAssistant:"
    answer = stub.Generate(pb.GenerateRequest(chat=chat, stopping=pb.Stopping(max_tokens=80)))
    assert answer.choices[0].finish.stop == "\nUser:"
    assert "User:" not in answer.choices[0].text


def test_a_stop_string_ends_text_and_usage(channel: grpc.Channel) -> None:
    whole = text_of(stream(channel))
    stop = whole[20:28]
    messages = stream(channel, stopping=pb.Stopping(max_tokens=24, stop=[stop]))
    assert text_of(messages) == whole[: whole.index(stop)]
    assert messages[-1].finishes[0].stop == stop
    assert messages[-1].summary.usage.completion_tokens == len(ids_of(messages)) < 24
    included = pb.Stopping(max_tokens=24, stop=[stop], include_stop=True)
    assert text_of(stream(channel, stopping=included)).endswith(stop)


def test_a_stop_token_ends_the_text(channel: grpc.Channel) -> None:
    ids = ids_of(stream(channel))
    messages = stream(channel, stopping=pb.Stopping(max_tokens=24, stop_token_ids=[ids[5]]))
    assert messages[-1].finishes[0].stop_token_id == ids[5]
    assert ids_of(messages) == ids[: ids.index(ids[5]) + 1]


def test_the_same_seed_gives_the_same_text(channel: grpc.Channel) -> None:
    sampling = pb.Sampling(temperature=1.0, top_p=0.95, top_k=200, seed=7)
    first, second = (text_of(stream(channel, sampling=sampling)) for _ in range(2))
    other = text_of(stream(channel, sampling=pb.Sampling(temperature=1.0, seed=8)))
    assert first == second != other


def test_max_duration_ends_with_time_limit_and_keeps_the_text(channel: grpc.Channel) -> None:
    stopping = pb.Stopping(max_tokens=100, ignore_eos=True)
    stopping.max_duration.FromMilliseconds(5)
    messages = stream(channel, stopping=stopping)
    assert messages[-1].finishes[0].reason == pb.FINISH_REASON_TIME_LIMIT


def test_a_request_without_max_tokens_ends_at_the_context(channel: grpc.Channel) -> None:
    stopping = pb.Stopping(ignore_eos=True)
    summary = stream(channel, stopping=stopping)[-1].summary
    assert summary.usage.prompt_tokens + summary.usage.completion_tokens in (128, 512)


def test_the_model_is_reported_as_found_in_memory(channel: grpc.Channel) -> None:
    model = ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest()).model
    assert (model.name, model.variant) == ("venturi-mini", "w8a8")
    assert (model.precision.weights, model.precision.activations) == ("int8", "int8")
    assert (model.precision.head, model.kv_cache.dtype) == ("int8", "int8")
    assert model.provenance.recipe == "w8a8"
    assert model.provenance.format == "compressed-tensors/int-quantized"
    assert len(model.layers) == 43
    assert {layer.method for layer in model.layers} == {"rtn", "none"}
    listed = ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest()).models
    assert [m.name for m in listed] == ["venturi-mini"]


def test_the_tokenizer_files_arrive_whole(channel: grpc.Channel) -> None:
    import hashlib

    files: dict[str, bytes] = {}
    digests: dict[str, str] = {}
    for piece in ModelServiceStub(channel).GetTokenizer(model_pb2.GetTokenizerRequest()):
        files[piece.file_name] = files.get(piece.file_name, b"") + piece.data
        digests[piece.file_name] = piece.sha256
    assert "tokenizer.json" in files
    for name, data in files.items():
        assert hashlib.sha256(data).hexdigest() == digests[name]


@pytest.mark.parametrize("text", ["héllo ✓ 你好 🙂", "\x00\n\t", " " * 60, "<|endoftext|>"])
def test_odd_text_is_served(channel: grpc.Channel, text: str) -> None:
    messages = stream(channel, text=text, stopping=pb.Stopping(max_tokens=8, ignore_eos=True))
    assert messages[-1].summary.usage.completion_tokens == 8


def test_the_sdk_streams_from_a_real_server(server: ServerProcess) -> None:
    with (
        Client(server.target) as client,
        client.stream(PROMPT, max_tokens=24) as stream_,
    ):
        text = "".join(stream_.text_stream)
    assert "Assistant:" in text


def test_everything_is_free_when_idle(channel: grpc.Channel) -> None:
    load = AdminServiceStub(channel).GetLoad(GetLoadRequest())
    assert (load.queued, load.running, load.kv_blocks_used) == (0, 0, 0)
    assert load.kv_blocks_free + load.kv_blocks_cached in (8, 2048)


def test_a_second_request_with_the_same_beginning_finds_it_cached(channel: grpc.Channel) -> None:
    """And gives the same text; another salt, or a bypass, finds nothing."""
    text = PROMPT + " It should serve vegetarian food, not be too expensive, and be open late."
    first, second = stream(channel, text=text), stream(channel, text=text)
    assert second[0].prompt_info.cached_tokens == second[-1].summary.usage.cached_tokens == 32
    assert text_of(first) == text_of(second)
    for cache in (pb.CacheOptions(salt="other"), pb.CacheOptions(bypass_prefix_cache=True)):
        third = stream(channel, text=text, cache=cache)
        assert third[0].prompt_info.cached_tokens == 0
        assert text_of(third) == text_of(first)


def test_several_choices_come_in_one_stream(channel: grpc.Channel) -> None:
    sampling = pb.Sampling(n=3, temperature=1.0, seed=3)
    messages = stream(channel, sampling=sampling)
    texts = ["", "", ""]
    for message in messages:
        for chunk in message.chunks:
            texts[chunk.index] += chunk.text_delta
    assert sorted(f.index for m in messages for f in m.finishes) == [0, 1, 2]
    assert [m.HasField("summary") for m in messages].count(True) == 1
    assert messages[-1].summary.usage.completion_tokens == 72
    unary = InferenceServiceStub(channel).Generate(
        pb.GenerateRequest(text=PROMPT, sampling=sampling, stopping=pb.Stopping(max_tokens=24))
    )
    assert [choice.text for choice in unary.choices] == texts
