"""What a caller says arrives in the request, and what is left out stays unset."""

from datetime import timedelta
from typing import Any

import pytest

from venturi import Client, GenerateOptions, PromptCompression, StreamOptions
from venturi._options import Prompt
from venturi._requests import generate, stream, tokenize
from venturi.testing import FakeServer
from venturi.v1 import inference_pb2 as pb

_CHAT = [{"role": "user", "content": "hi"}]


def _sent(prompt: Prompt = "x", **options: object) -> pb.GenerateRequest:
    request = generate(prompt, options).request  # type: ignore[arg-type]
    assert isinstance(request, pb.GenerateRequest)
    return request


def test_unset_options_are_unset_in_the_request() -> None:
    assert _sent("x") == pb.GenerateRequest(text="x")
    assert _sent("x", temperature=None, stop=None, model=None) == pb.GenerateRequest(text="x")


def test_zero_is_not_unset() -> None:
    sampling = _sent(temperature=0, seed=0).sampling
    assert sampling.HasField("temperature")
    assert sampling.HasField("seed")
    assert not sampling.HasField("top_p")


def test_a_prompt_is_text_token_ids_or_messages() -> None:
    assert _sent("hi").text == "hi"
    assert list(_sent([1, 2]).token_ids.ids) == [1, 2]
    assert list(_sent((1, 2)).token_ids.ids) == [1, 2]
    chat = _sent(_CHAT, add_generation_prompt=False, template_kwargs={"tools": []}).chat
    assert chat == pb.Chat(
        messages=[pb.ChatMessage(role="user", content="hi")],
        add_generation_prompt=False,
        template_kwargs='{"tools": []}',
    )
    assert not _sent(_CHAT).chat.HasField("add_generation_prompt")


def test_stop_is_one_string_or_several() -> None:
    assert list(_sent(stop="ab").stopping.stop) == ["ab"]
    assert list(_sent(stop=["a", "b"]).stopping.stop) == ["a", "b"]


@pytest.mark.parametrize("given", [1.5, timedelta(seconds=1.5)])
def test_durations_are_seconds_or_timedelta(given: float | timedelta) -> None:
    assert _sent(max_duration=given).stopping.max_duration.ToMilliseconds() == 1500


def test_structured_output() -> None:
    assert list(_sent(choice=["yes", "no"]).structured.choice.values) == ["yes", "no"]
    assert _sent(json_schema={"type": "object"}).structured.json_schema == '{"type": "object"}'
    assert _sent(regex="a+").structured.regex == "a+"
    with pytest.raises(ValueError, match="regex and choice exclude each other"):
        _sent(regex="a", choice=["a"])


def test_prompt_compression() -> None:
    options = PromptCompression(keep_ratio=0.5, protected_spans=[(0, 4)], budget=0.25)
    sent = _sent(prompt_compression=options).prompt_compression
    assert sent.mode == pb.PromptCompression.MODE_ON
    assert sent.WhichOneof("target") == "keep_ratio"
    assert sent.protected_spans == [pb.Span(start=0, end=4)]
    assert sent.budget.ToMilliseconds() == 250
    assert not sent.HasField("strict")
    with pytest.raises(ValueError, match="keep_ratio and target_tokens"):
        _sent(prompt_compression=PromptCompression(keep_ratio=0.5, target_tokens=9))


def test_stream_has_options_of_its_own() -> None:
    request = stream("x", {"max_delay": 0.05, "max_tokens_per_message": 4}, lambda _: []).request
    assert isinstance(request, pb.GenerateStreamRequest)
    assert request.stream.max_delay.ToMilliseconds() == 50
    assert request.stream.max_tokens_per_message == 4
    with pytest.raises(TypeError, match="max_delay"):
        _sent(max_delay=0.05)


def test_an_unknown_option_is_refused_with_a_hint() -> None:
    with pytest.raises(TypeError, match=r"'max_token'; did you mean 'max_tokens'\?"):
        _sent(max_token=3)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"top_k": -1}, ValueError),
        ({"seed": "x"}, TypeError),
        ({"stop": [1]}, TypeError),
        ({"max_duration": "1"}, TypeError),
        ({"model": "\ud800"}, ValueError),
        ({"timeout": float("inf")}, ValueError),
        ({"timeout": float("nan")}, ValueError),
        ({"timeout": 0}, ValueError),
        ({"timeout": "1"}, TypeError),
    ],
)
def test_a_value_that_no_request_can_hold_is_refused_by_name(
    options: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error, match=next(iter(options))):
        _sent("x", **options)


def test_prompts_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="empty list"):
        _sent([])
    with pytest.raises(ValueError, match="add_generation_prompt is for a prompt of messages"):
        _sent("x", add_generation_prompt=True)


@pytest.mark.parametrize(
    ("prompt", "error", "match"),
    [
        (None, TypeError, "prompt: give text, token ids or messages, not NoneType"),
        (7, TypeError, "not int"),
        (b"text", TypeError, "not bytes"),
        ({"role": "user", "content": "x"}, TypeError, "not dict"),
        ([1, None], TypeError, r"prompt\[1\]: None is no token id"),
        ([1, "x"], TypeError, r"prompt\[1\]: 'x' is no token id"),
        ([1, True], TypeError, r"prompt\[1\]"),
        ([1, -1], ValueError, r"prompt\[1\]: -1 is no token id"),
        ([1 << 32], ValueError, r"prompt\[0\]"),
        ([{"role": "user"}], ValueError, r"prompt\[0\]: 'content' is missing"),
        ([{"role": "user", "content": "x", "name": "y"}], ValueError, "'name' is not part"),
        ([{"role": "user", "content": None}], TypeError, r"prompt\[0\]\['content'\]"),
        ([{"role": "user", "content": "x"}, "y"], TypeError, r"prompt\[1\]: a message is a dict"),
    ],
)
def test_a_prompt_that_is_none_is_refused_by_its_place(
    prompt: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        _sent(prompt)


def test_every_field_of_the_contract_has_an_option() -> None:
    request = pb.GenerateStreamRequest()
    sections = ("sampling", "stopping", "structured", "output", "scheduling", "cache", "stream")
    expected = {
        option.name for name in sections for option in getattr(request, name).DESCRIPTOR.fields
    }
    expected |= {"model", "request_id", "prompt_compression", "timeout", "metadata"}
    expected |= {"add_generation_prompt", "template_kwargs"}
    assert StreamOptions.__optional_keys__ == expected
    only_stream = StreamOptions.__optional_keys__ - GenerateOptions.__optional_keys__
    assert only_stream == {"max_tokens_per_message", "max_delay"}


def test_every_option_reaches_the_server(client: Client, server: FakeServer) -> None:
    client.generate(
        _CHAT,
        model="fake@original",
        request_id="mine",
        metadata={"X-Tenant": "a"},
        max_tokens=5,
        logit_bias={3: -1.0},
        stop_token_ids=[2],
        ignore_eos=True,
        priority=-1,
        queue_timeout=2,
        salt="s",
        return_token_ids=False,
    )
    assert server.requests == [
        pb.GenerateRequest(
            model="fake@original",
            request_id="mine",
            chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")]),
            sampling=pb.Sampling(logit_bias={3: -1.0}),
            stopping=pb.Stopping(max_tokens=5, stop_token_ids=[2], ignore_eos=True),
            output=pb.OutputOptions(return_token_ids=False),
            scheduling=pb.Scheduling(priority=-1, queue_timeout=timedelta(seconds=2)),
            cache=pb.CacheOptions(salt="s"),
        )
    ]
    assert server.metadata[0]["x-tenant"] == "a"


def test_tokenize_takes_text_or_messages() -> None:
    assert tokenize("hi", "", None, {}, None).request == pb.TokenizeRequest(text="hi")
    request = tokenize(_CHAT, "m", False, {}, None).request
    assert request == pb.TokenizeRequest(
        model="m",
        chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")]),
        add_special_tokens=False,
    )
