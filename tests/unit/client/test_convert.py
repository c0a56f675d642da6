"""What the service answers becomes dataclasses, with nothing lost or made up."""

import dataclasses

import pytest

from venturi import FinishReason, Phase, TokenLogprob, VenturiError, _types
from venturi._convert import Collector, from_proto, generation
from venturi.v1 import admin_pb2, model_pb2
from venturi.v1 import inference_pb2 as pb

_MESSAGES = {
    **{name: message for module in (pb, model_pb2) for name, message in vars(module).items()},
    "Load": admin_pb2.GetLoadResponse,
    "StartupEvent": admin_pb2.WatchStartupResponse,
}
_WRITTEN_BY_HAND = {"Chunk", "Choice", "Generation"}
_COPIED = [
    cls
    for name, cls in vars(_types).items()
    if dataclasses.is_dataclass(cls) and name not in _WRITTEN_BY_HAND | {"Tokenization"}
]


@pytest.mark.parametrize("cls", _COPIED, ids=lambda cls: cls.__name__)
def test_dataclasses_have_the_fields_of_their_messages(cls: type) -> None:
    ours = {field.name.removesuffix("_s") for field in dataclasses.fields(cls)}
    assert ours == set(_MESSAGES[cls.__name__].DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize(
    ("cls", "names"), [(FinishReason, pb.FinishReason.keys()), (Phase, admin_pb2.Phase.keys())]
)
def test_enums_have_the_values_of_the_contract(
    cls: type[FinishReason | Phase], names: list[str]
) -> None:
    prefix = names[0].removesuffix("UNSPECIFIED")
    assert [each.name for each in cls] == [name.removeprefix(prefix) for name in names]


def test_a_value_of_a_newer_server_reads_as_unspecified() -> None:
    message = admin_pb2.WatchStartupResponse(phase=99)  # type: ignore[arg-type]
    assert from_proto(_types.StartupEvent, message).phase is Phase.UNSPECIFIED


def test_what_was_not_measured_is_none() -> None:
    message = model_pb2.Model(name="m", quality=model_pb2.MeasuredQuality(perplexity=0.0))
    model = from_proto(_types.Model, message)
    assert model.speed is None
    assert model.quality is not None
    assert model.quality.perplexity == 0.0
    assert model.quality.mean_kl_nats is None
    assert model.precision.weights == ""


def _two_choices() -> list[pb.GenerateStreamResponse]:
    logprobs = [pb.TokenLogprobs(token_id=7, logprob=-0.5, rank=1, top=[pb.TokenLogprob()])]
    stop = pb.ChoiceFinish(index=0, reason=pb.FINISH_REASON_STOP, stop="END")
    length = pb.ChoiceFinish(index=1, reason=pb.FINISH_REASON_LENGTH)
    usage = pb.Usage(prompt_tokens=3, completion_tokens=4)
    return [
        pb.GenerateStreamResponse(
            prompt_info=pb.PromptInfo(request_id="r", model="m", variant="v"),
            chunks=[
                pb.Chunk(index=1, text_delta="b", token_ids=[8]),
                pb.Chunk(index=0, text_delta="a", token_ids=[7], logprobs=logprobs),
            ],
        ),
        pb.GenerateStreamResponse(
            chunks=[pb.Chunk(index=0, text_delta="aa", token_ids=[7, 7])], finishes=[length]
        ),
        pb.GenerateStreamResponse(finishes=[stop], summary=pb.Summary(usage=usage)),
    ]


def test_the_pieces_of_a_stream_make_a_generation() -> None:
    collector = Collector()
    chunks = [chunk for message in _two_choices() for chunk in collector.add(message)]
    assert [(chunk.index, chunk.text) for chunk in chunks] == [(1, "b"), (0, "a"), (0, "aa")]
    result = collector.generation()
    assert (result.text, result.token_ids) == ("aaa", (7, 7, 7))
    assert (result.finish_reason, result.matched_stop) == (FinishReason.STOP, "END")
    assert [choice.text for choice in result.choices] == ["aaa", "b"]
    assert result.choices[1].finish_reason is FinishReason.LENGTH
    assert result.choices[1].matched_stop is None
    assert result.choices[0].logprobs[0].top == (TokenLogprob(0, 0.0),)
    assert result.usage.completion_tokens == 4
    assert result.timings.ttft_s is None
    assert result.compression is None


def test_a_unary_response_reads_like_a_stream() -> None:
    finish = pb.ChoiceFinish(reason=pb.FINISH_REASON_STOP, stop_token_id=0)
    report = pb.CompressionReport(original_tokens=9, kept_tokens=5, method="x")
    result = generation(
        pb.GenerateResponse(
            prompt_info=pb.PromptInfo(request_id="r", compression=report),
            choices=[pb.Choice(text="t", token_ids=[1], finish=finish)],
            summary=pb.Summary(),
        )
    )
    assert (result.text, result.matched_stop, result.request_id) == ("t", 0, "r")
    assert result.compression is not None
    assert result.compression.kept_tokens == 5
    assert result.compression.elapsed_s is None


def test_a_response_without_its_summary_is_an_error_with_the_text_so_far() -> None:
    collector = Collector()
    collector.add(_two_choices()[0])
    with pytest.raises(VenturiError, match="without its summary") as caught:
        collector.generation()
    assert (caught.value.partial, caught.value.request_id) == ("a", "r")
