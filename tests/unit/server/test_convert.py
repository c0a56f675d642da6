"""Every field of the contract is either served, and then changes something, or refused."""

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from engine.client.generation import Delta
from engine.errors import InvalidRequest, NotServed
from engine.types import Constraint, TokenEvent, TokenLogprobs
from server import convert
from server.unserved import SERVED, refuse_unserved
from venturi.v1 import inference_pb2 as pb

# Read elsewhere: where the request goes, its id, and what leaves of the response.
ELSEWHERE = {"model", "request_id", "output.return_token_ids"}
# Lists of messages count as one value: their leaves are set together.
VALUES: dict[str, Any] = {
    "chat.messages": [{"role": "tool"}],
    "chat.add_generation_prompt": False,
    "chat.template_kwargs": '{"a": 1}',
    "token_ids.ids": [3],
    "sampling.logit_bias": {3: 0.5},
    "sampling.n": 2,
    "stopping.stop": ["x"],
    "stopping.stop_token_ids": [3],
    "stopping.max_duration": {"seconds": 3},
    "scheduling.queue_timeout": {"seconds": 3},
    "stream.max_delay": {"seconds": 3},
    "structured.choice.values": ["x"],
    "prompt_compression.protected_spans": [{"start": 1, "end": 3}],
    "prompt_compression.budget": {"seconds": 3},
}


def leaves(descriptor: Descriptor, path: str = "") -> Iterator[str]:
    """Paths of all fields that are no message of ours, or a map."""
    for field in descriptor.fields:
        kind, name = field.message_type, f"{path}{field.name}"
        if kind is None or kind.file.package != "venturi.v1" or kind.GetOptions().map_entry:
            yield name
        else:
            yield from leaves(kind, f"{name}.")


LEAVES = set(leaves(pb.GenerateStreamRequest.DESCRIPTOR))


def setting(path: str) -> pb.GenerateStreamRequest:
    """A request that sets that field."""
    whole = pb.GenerateStreamRequest(text="x")
    if path.startswith("chat.") and path != "chat.messages":
        whole.chat.messages.add(role="user")
    *parents, name = path.split(".")
    message: Message = whole
    for parent in parents:
        message = getattr(message, parent)
    field = message.DESCRIPTOR.fields_by_name[name]
    value = VALUES.get(path, "x" if field.type == field.TYPE_STRING else 1)
    message.MergeFrom(type(message)(**{name: value}))
    return whole


def read(request: pb.GenerateStreamRequest) -> Any:
    return convert.generation_request(request, "id", None)


CHAT = pb.Chat(messages=[pb.ChatMessage(role="user")])
INSIDE_CHAT = {leaf for leaf in SERVED if leaf.startswith("chat.messages.")}


@pytest.mark.parametrize("leaf", sorted(SERVED - ELSEWHERE - INSIDE_CHAT - {"text"}))
def test_each_served_field_changes_the_request(leaf: str) -> None:
    bare = {"chat": CHAT} if leaf.startswith("chat.") else {"text": "x"}
    changed, unchanged = read(setting(leaf)), read(pb.GenerateStreamRequest(**bare))
    assert changed != unchanged
    if leaf.startswith("stream."):
        assert changed.coalescing != unchanged.coalescing


@pytest.mark.parametrize("message", [{"role": "tool"}, {"role": "user", "content": "y"}])
def test_a_chats_messages_are_read_whole(message: dict[str, str]) -> None:
    changed = read(pb.GenerateStreamRequest(chat=pb.Chat(messages=[message])))
    assert changed.prompt.messages == [{"content": "", **message}]
    assert read(pb.GenerateStreamRequest(text="y")).prompt == "y"


def test_what_is_served_exists_and_all_else_is_refused_by_its_path() -> None:
    assert LEAVES >= SERVED
    unserved = LEAVES - SERVED
    assert {leaf.split(".")[0] for leaf in unserved} == {"prompt_compression"}
    for leaf in unserved:
        path = "prompt_compression.protected_spans" if "protected_spans" in leaf else leaf
        request = setting(path)
        if path.endswith(".mode"):
            request.prompt_compression.mode = pb.PromptCompression.MODE_AUTO
        with pytest.raises(NotServed) as caught:
            refuse_unserved(request)
        assert caught.value.field.startswith(path)


def test_a_neutral_value_is_no_wish() -> None:
    off = pb.PromptCompression(mode=pb.PromptCompression.MODE_OFF)
    refuse_unserved(pb.GenerateRequest(text="x", prompt_compression=off))


def test_constraints_have_their_kind() -> None:
    for structured, wanted in [
        (pb.Structured(), None),
        (pb.Structured(json_schema="{}"), Constraint(kind="json_schema", text="{}")),
        (pb.Structured(regex="a"), Constraint(kind="regex", text="a")),
        (pb.Structured(grammar="g"), Constraint(kind="grammar", text="g")),
        (pb.Structured(choice={"values": ["a"]}), Constraint(kind="choice", text='["a"]')),
    ]:
        request = pb.GenerateStreamRequest(text="x", structured=structured)
        assert read(request).constraint == wanted
    with pytest.raises(InvalidRequest) as caught:
        read(pb.GenerateStreamRequest(text="x", structured=pb.Structured(choice={})))
    assert caught.value.field == "structured.choice"


def test_a_chunk_has_what_its_tokens_have() -> None:
    logprobs = TokenLogprobs(7, -0.5, 2, [(3, -0.25)])
    tokens = [TokenEvent(id="a", token=7, choice=1, logprobs=logprobs)]
    chunk = convert.chunk(Delta(1, "x", tokens, None), True)
    top = [pb.TokenLogprob(token_id=3, logprob=-0.25)]
    wanted = pb.TokenLogprobs(token_id=7, logprob=-0.5, rank=2, top=top)
    assert chunk == pb.Chunk(index=1, text_delta="x", token_ids=[7], logprobs=[wanted])
    without = convert.chunk(Delta(1, "x", tokens, None), False)
    assert (list(without.token_ids), list(without.logprobs)) == ([], [wanted])
