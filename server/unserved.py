"""Refuses what a request sets and this server does not do: nothing is silently ignored."""

from typing import Any

from google.protobuf.message import Message

from engine.errors import NotServed
from venturi.v1 import inference_pb2

# Leaves by path; ``convert`` reads each of them.
SERVED = {
    "model",
    "request_id",
    "text",
    "token_ids.ids",
    "chat.messages.role",
    "chat.messages.content",
    "chat.add_generation_prompt",
    "chat.template_kwargs",
    "sampling.temperature",
    "sampling.top_p",
    "sampling.top_k",
    "sampling.min_p",
    "sampling.seed",
    "sampling.n",
    "sampling.logit_bias",
    "sampling.presence_penalty",
    "sampling.frequency_penalty",
    "sampling.repetition_penalty",
    "stopping.max_tokens",
    "stopping.min_tokens",
    "stopping.max_duration",
    "stopping.stop",
    "stopping.stop_token_ids",
    "stopping.include_stop",
    "stopping.ignore_eos",
    "structured.json_schema",
    "structured.regex",
    "structured.grammar",
    "structured.choice.values",
    "output.logprobs",
    "output.prompt_logprobs",
    "output.return_token_ids",
    "output.echo",
    "scheduling.priority",
    "scheduling.queue_timeout",
    "cache.salt",
    "cache.bypass_prefix_cache",
    "stream.max_tokens_per_message",
    "stream.max_delay",
}
_PACKAGE = inference_pb2.DESCRIPTOR.package
# Values that ask for what happens anyway.
NEUTRAL: dict[str, Any] = {
    "prompt_compression.mode": inference_pb2.PromptCompression.MODE_OFF,
}


def refuse_unserved(message: Message, path: str = "") -> None:
    """Raises ``NotServed`` with the path of the first set field that is not served."""
    for field, value in message.ListFields():
        name = f"{path}.{field.name}" if path else field.name
        if name in SERVED or NEUTRAL.get(name) == value:
            continue
        if field.message_type is None or field.message_type.file.package != _PACKAGE:
            raise NotServed(name, "this server does not serve this field")
        for each in value if field.is_repeated else (value,):
            refuse_unserved(each, name)
