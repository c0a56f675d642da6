"""Text and chats to token ids and back, with the tokenizer of a Hugging Face folder."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from engine.client.chat_template import ChatTemplate
from engine.errors import InvalidRequest, ModelLoadError

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
)


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """A file that a client needs to tokenise as the server does."""

    name: str
    data: bytes
    sha256: str


class Tokenizer:
    """Thread-safe: the Rust tokeniser has no state and releases the GIL."""

    def __init__(
        self, folder: Path, tokenizer: tokenizers.Tokenizer, template: ChatTemplate | None
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._files = tuple(_read_files(folder))
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self._longest_token = max(map(len, vocabulary), default=1)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Reads tokenizer.json and the chat template. Raises ``ModelLoadError``."""
        path = folder / "tokenizer.json"
        if not path.exists():
            raise ModelLoadError(
                f"{path} is missing: save it with transformers' AutoTokenizer, use_fast=True"
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ModelLoadError(f"{path} is broken: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(folder, tokenizer, ChatTemplate.from_folder(folder))

    @property
    def has_chat_template(self) -> bool:
        """Whether ``render`` works."""
        return self._template is not None

    @property
    def longest_token(self) -> int:
        """Characters of the longest token: text of n times as many has at least n tokens."""
        return self._longest_token

    @property
    def chat_stop(self) -> str:
        """The text that begins the next user's turn, "" where the template does not tell."""
        return "" if self._template is None else self._template.turn_separator()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def render(
        self, messages: list[dict[str, str]], add_generation_prompt: bool, extra: dict[str, Any]
    ) -> str:
        """The chat as text. Raises ``InvalidRequest`` where the template refuses it."""
        if self._template is None:
            raise InvalidRequest("chat", "this model has no chat template: send text instead")
        return self._template.render(messages, add_generation_prompt, extra)

    def files(self) -> Iterator[TokenizerFile]:
        """The files that make this tokenizer, as they were when it was loaded."""
        yield from self._files


def _read_files(folder: Path) -> Iterator[TokenizerFile]:
    for name in _FILES:
        path = folder / name
        if path.exists():
            data = path.read_bytes()
            yield TokenizerFile(name, data, hashlib.sha256(data).hexdigest())
