"""Chat templates as transformers has them, in jinja2's immutable sandbox."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.client.files import read_optional_json
from engine.errors import InvalidRequest, ModelLoadError

_MAX_TEXT = 4 << 20
_RESERVED = {"messages", "add_generation_prompt", "bos_token", "eos_token"}


class _GenerationBlock(Extension):
    """``{% generation %}`` marks the assistant's part for training; it prints its body."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template and the special tokens that it may print."""

    def __init__(self, source: str, variables: dict[str, Any]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._template = environment.from_string(source)
        self._variables = variables

    @classmethod
    def from_folder(cls, folder: Path) -> "ChatTemplate | None":
        """chat_template.jinja, else tokenizer_config.json's; None where there is neither."""
        config = read_optional_json(folder / "tokenizer_config.json")
        path = folder / "chat_template.jinja"
        source = _read_text(path) if path.exists() else config.get("chat_template")
        if not isinstance(source, str):
            return None
        tokens = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token")}
        try:
            return cls(source, tokens)
        except jinja2.TemplateError as error:
            raise ModelLoadError(f"{folder}: the chat template is broken: {error}") from error

    def turn_separator(self) -> str:
        """What a template prints between an answer and the next user's text, "" if unknown.

        It ends an answer of a model whose turns are plain text; where turns end with a special
        token, that token ends the answer first.
        """
        answer, question = "\x02answer\x03", "\x02question\x03"
        messages = [
            {"role": "user", "content": question.upper()},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": question},
        ]
        try:
            text = self.render(messages, False, {})
        except InvalidRequest:
            return ""
        _, _, after = text.partition(answer)
        between, found, _ = after.partition(question)
        return between.rstrip() if found else ""

    def render(
        self, messages: list[dict[str, str]], add_generation_prompt: bool, extra: dict[str, Any]
    ) -> str:
        """The chat as text. Raises ``InvalidRequest`` where the template refuses it."""
        if reserved := _RESERVED & extra.keys():
            raise InvalidRequest("chat.template_kwargs", f"{min(reserved)} cannot be set")
        variables = {**self._variables, **extra, "messages": messages}
        try:
            text = self._template.render(variables, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is foreign code: whatever it raises is its answer
            reason = str(error) if isinstance(error, jinja2.TemplateError) else "it failed"
            raise InvalidRequest("chat", f"the chat template refused the messages: {reason}") from (
                error
            )
        if len(text) > _MAX_TEXT:
            raise InvalidRequest("chat", f"the rendered chat is longer than {_MAX_TEXT} characters")
        return text


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read as text: {error}") from error


def _token_text(value: Any) -> str:
    return value.get("content", "") if isinstance(value, dict) else value or ""


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
