"""Refuses what a request sets and this server does not do: nothing is silently ignored."""

from typing import Any

from google.protobuf.message import Message

from engine.errors import NotServed
from venturi.v1 import inference_pb2

# Fields by path; a message's path stands for all that is below it.
SERVED = {
    "model",
    "request_id",
    "text",
    "token_ids",
    "chat",
    "sampling.temperature",
    "sampling.top_p",
    "sampling.top_k",
    "sampling.seed",
    "sampling.n",
    "stopping.max_tokens",
    "stopping.max_duration",
    "stopping.stop",
    "stopping.stop_token_ids",
    "stopping.include_stop",
    "stopping.ignore_eos",
    "output.return_token_ids",
    "scheduling",
    "cache",
    "stream",
}
_PACKAGE = inference_pb2.DESCRIPTOR.package
# Values that ask for what happens anyway.
NEUTRAL: dict[str, Any] = {
    "sampling.min_p": 0.0,
    "sampling.presence_penalty": 0.0,
    "sampling.frequency_penalty": 0.0,
    "sampling.repetition_penalty": 1.0,
    "stopping.min_tokens": 0,
    "output.echo": False,
    "prompt_compression.mode": inference_pb2.PromptCompression.MODE_OFF,
}


def refuse_unserved(message: Message, path: str = "") -> None:
    """Raises ``NotServed`` with the path of the first set field that is not served."""
    for field, value in message.ListFields():
        name = f"{path}.{field.name}" if path else field.name
        if name in SERVED or NEUTRAL.get(name) == value:
            continue
        ours = field.message_type is not None and field.message_type.file.package == _PACKAGE
        if not ours or field.is_repeated:
            raise NotServed(name, "this server does not serve this field")
        refuse_unserved(value, name)
