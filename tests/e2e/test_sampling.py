"""Each way to sample, through real gRPC, with the SDK."""

import json
import re
from collections.abc import Iterator

import grpc
import pytest

from server.testing import ServerProcess
from venturi import BadRequestError, Client
from venturi.v1 import inference_pb2 as pb
from venturi.v1.inference_pb2_grpc import InferenceServiceStub

PROMPT = "User: I would like to find a restaurant in San Jose."
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "stars": {"type": "integer", "minimum": 1, "maximum": 5},
    },
    "required": ["city", "stars"],
    "additionalProperties": False,
}


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.target) as client:
        yield client


def test_a_bias_makes_or_forbids_a_token(client: Client) -> None:
    plain = client.generate(PROMPT, max_tokens=8)
    always = client.generate(PROMPT, max_tokens=8, logit_bias={500: 100.0}, temperature=1.0)
    assert always.token_ids == (500,) * 8
    never = client.generate(PROMPT, max_tokens=1, logit_bias={plain.token_ids[0]: -100.0})
    assert never.token_ids[0] != plain.token_ids[0]


def test_penalties_end_a_repetition(client: Client) -> None:
    forced = {500: 20.0}
    for name, value in (("presence_penalty", 2.0), ("frequency_penalty", 2.0)):
        found = client.generate(PROMPT, max_tokens=30, logit_bias=forced, **{name: value})
        plain = client.generate(PROMPT, max_tokens=30, logit_bias=forced)
        assert found.token_ids.count(500) <= plain.token_ids.count(500), name
    found = client.generate(PROMPT, max_tokens=30, repetition_penalty=100.0)
    assert len(set(found.token_ids)) == 30


def test_min_p_of_one_is_greedy(client: Client) -> None:
    greedy = client.generate(PROMPT, max_tokens=12)
    found = client.generate(PROMPT, max_tokens=12, temperature=1.5, min_p=1.0, seed=4)
    assert found.text == greedy.text


def test_min_tokens_puts_off_the_end(client: Client) -> None:
    ends = {0: 100.0}
    assert client.generate(PROMPT, max_tokens=20, logit_bias=ends).usage.completion_tokens == 1
    found = client.generate(PROMPT, max_tokens=20, min_tokens=7, logit_bias=ends)
    assert found.usage.completion_tokens == 8
    stop = client.generate(PROMPT, max_tokens=20).text[:1]
    found = client.generate(PROMPT, max_tokens=20, min_tokens=7, stop=[stop])
    assert found.usage.completion_tokens > 7


def test_log_probabilities_stand_beside_their_tokens(client: Client, channel: grpc.Channel) -> None:
    response = client.generate(PROMPT, max_tokens=10, logprobs=3, prompt_logprobs=1)
    (choice,) = response.choices
    assert [each.token_id for each in choice.logprobs] == list(choice.token_ids)
    for each in choice.logprobs:
        assert (each.rank, each.logprob) == (1, each.top[0].logprob)
        assert len(each.top) == 3
        assert each.logprob <= 0
    assert len(response.prompt_logprobs) == response.usage.prompt_tokens - 1
    request = pb.GenerateStreamRequest(
        text=PROMPT,
        stopping=pb.Stopping(max_tokens=10),
        output=pb.OutputOptions(logprobs=0, prompt_logprobs=0, return_token_ids=False),
    )
    messages = list(InferenceServiceStub(channel).GenerateStream(request))
    chunks = [chunk for message in messages for chunk in message.chunks]
    found = [each for chunk in chunks for each in chunk.logprobs]
    assert [each.token_id for each in found] == list(choice.token_ids)
    assert not any(each.top for each in found)
    assert not any(chunk.token_ids for chunk in chunks)
    assert len(messages[0].prompt_info.prompt_logprobs) == response.usage.prompt_tokens - 1


def test_each_token_of_a_text_has_the_same_log_probability_as_prompt_and_as_answer(
    client: Client,
) -> None:
    answer = client.generate(PROMPT, max_tokens=12, logprobs=0, temperature=1.0, seed=1)
    ids = [*client.tokenize(PROMPT).token_ids, *answer.token_ids]
    prompt = client.generate(ids, max_tokens=1, prompt_logprobs=0)
    of_answer = [each.logprob for each in answer.choices[0].logprobs]
    of_prompt = [each.logprob for each in prompt.prompt_logprobs][-12:]
    assert of_prompt == pytest.approx(of_answer, abs=1e-3)


def test_echo_puts_the_prompt_first(client: Client) -> None:
    plain = client.generate(PROMPT, max_tokens=6)
    for prompt in (PROMPT, list(client.tokenize(PROMPT).token_ids)):
        found = client.generate(prompt, max_tokens=6, echo=True, stop=["restaurant in"])
        assert found.text == PROMPT + plain.text
        assert found.token_ids == plain.token_ids
    both = client.generate(PROMPT, max_tokens=6, echo=True, n=2, temperature=1.0)
    assert all(choice.text.startswith(PROMPT) for choice in both.choices)


def test_echo_of_a_chat_is_the_rendered_text(client: Client, channel: grpc.Channel) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="Find me a hotel.")])
    stub = InferenceServiceStub(channel)
    rendered = stub.Tokenize(pb.TokenizeRequest(chat=chat)).text
    request = pb.GenerateRequest(chat=chat, stopping={"max_tokens": 4}, output={"echo": True})
    assert stub.Generate(request).choices[0].text.startswith(rendered)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 4.0])
def test_structured_output_matches(client: Client, temperature: float) -> None:
    for seed in range(3):
        sampling = {"temperature": temperature, "seed": seed, "max_tokens": 200}
        found = client.generate(PROMPT, json_schema=SCHEMA, **sampling)
        assert found.finish_reason == "eos"
        assert 1 <= json.loads(found.text)["stars"] <= 5
        found = client.generate(PROMPT, regex=r"\d{4}-\d{2}", **sampling)
        assert re.fullmatch(r"[0-9]{4}-[0-9]{2}", found.text)
        found = client.generate(PROMPT, choice=["hotel", "train", "taxi"], n=2, **sampling)
        assert {choice.text for choice in found.choices} <= {"hotel", "train", "taxi"}
        found = client.generate(PROMPT, grammar='start: "a" B\nB: /[0-9]/', **sampling)
        assert re.fullmatch("a[0-9]", found.text)


def test_a_bad_schema_leaves_the_engine_alone(client: Client, server: ServerProcess) -> None:
    pids = server.engine_pids()
    for schema in ("{", '{"type": "poem"}', '{"$ref": "file:///etc/passwd"}'):
        with pytest.raises(BadRequestError) as caught:
            client.generate(PROMPT, json_schema=schema)
        assert "structured.json_schema" in str(caught.value)
    assert server.engine_pids() == pids
    assert client.generate(PROMPT, max_tokens=2).usage.completion_tokens == 2


def test_a_constraint_that_becomes_too_complex_is_the_requests_fault(client: Client) -> None:
    for kind, text in (("regex", "(a|aa){1000}"), ("grammar", 'start: "a" start')):
        with pytest.raises(BadRequestError, match="too complex") as caught:
            client.generate(PROMPT, max_tokens=5, **{kind: text})
        assert f"structured.{kind}" in str(caught.value)
    assert client.generate(PROMPT, max_tokens=2).usage.completion_tokens == 2


def test_json_is_not_padded_with_blanks(client: Client) -> None:
    for seed in range(4):
        found = client.generate(
            PROMPT, json_schema=SCHEMA, max_tokens=60, temperature=1.0, seed=seed
        )
        assert found.finish_reason == "eos"
        assert not re.search(r"\s\s|\n", found.text)
