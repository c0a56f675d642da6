"""Chat templates: rendered as transformers does, and without a way out of the sandbox."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from engine.client.chat_template import ChatTemplate
from engine.errors import InvalidRequest, ModelLoadError

USER = [{"role": "user", "content": "Hi"}]


def template(source: str, **variables: object) -> ChatTemplate:
    return ChatTemplate(source, dict(variables))


def render(source: str, **extra: object) -> str:
    return template(source).render(USER, True, extra)


def test_messages_prompt_and_tokens_are_there() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}{{ eos_token }}"
    )
    chat = template(source, bos_token="<s>", eos_token="</s>")
    messages = [*USER, {"role": "assistant", "content": "Ho {{ 1 + 1 }}"}]
    assert chat.render(messages, False, {}) == "<s>[user] Hi\n[assistant] Ho {{ 1 + 1 }}\n</s>"
    assert chat.render(USER, True, {}) == "<s>[user] Hi\n[assistant]</s>"


def test_blocks_leave_no_blank_lines() -> None:
    source = (
        "{% for m in messages %}\n    {% if m %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}"
    )
    assert render(source) == "Hi\n"


def test_loop_controls_and_namespaces_work() -> None:
    source = (
        "{% set ns = namespace(n=0) %}{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}"
        "{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}"
    )
    assert render(source) == "3"


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("{{ x | tojson }}", '{"b": "é<", "a": [1, null]}'),
        ("{{ x.a | tojson(indent=2) }}", "[\n  1,\n  null\n]"),
        ("{{ x | tojson(ensure_ascii=False) }}", '{"b": "é<", "a": [1, null]}'),
        ("{{ x | tojson(sort_keys=True) }}", '{"a": [1, null], "b": "é<"}'),
        ("{{ x | tojson(separators=(',', ':')) }}", '{"b":"é<","a":[1,null]}'),
    ],
)
def test_tojson_is_that_of_transformers(source: str, wanted: str) -> None:
    assert render(source, x={"b": "é<", "a": [1, None]}) == wanted


def test_generation_blocks_print_their_body() -> None:
    """Templates that mark the assistant's part for training serve as well."""
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "Hi"


def test_strftime_now_prints_a_date() -> None:
    assert re.fullmatch(r"20\d\d-\d\d", render("{{ strftime_now('%Y-%m') }}"))


def test_raise_exception_refuses_the_messages() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.field == "chat"


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ (0).__class__.__base__ }}",
    "{{ raise_exception.__globals__['__builtins__'] }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{0.__class__}'.format_map({'0': 1}) }}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages.clear() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]
FAILURES = [
    "{{ range(10**9) | list }}",
    "{{ 1 / 0 }}",
    "{{ undefined.attribute }}",
    "{{ messages[99].content }}",
]


@pytest.mark.parametrize("source", ESCAPES + FAILURES)
def test_escapes_and_failures_are_refused_and_change_nothing(source: str) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(InvalidRequest) as caught:
        template(source).render(messages, True, {})
    assert caught.value.field == "chat"
    assert "\n" not in str(caught.value)
    assert messages == USER


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__ }}",
        "{{ strftime_now.__globals__ }}",
        "{{ ''['__cla' + 'ss__'] }}{{ ''|attr('__class__') }}",
        "{% set f = '{0.__class__}'.format %}{{ f(messages) }}",
    ],
)
def test_unsafe_attributes_print_nothing(source: str) -> None:
    assert render(source) == ""


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "bos_token", "eos_token"])
def test_reserved_names_cannot_be_set(name: str) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        render("{{ bos_token }}", **{name: "x"})
    assert caught.value.field == "chat.template_kwargs"


def test_extra_arguments_reach_the_template() -> None:
    assert (
        render(
            "{{ enable_thinking }} {{ tools[0].name }}",
            enable_thinking=False,
            tools=[{"name": "f"}],
        )
        == "False f"
    )


def test_extra_arguments_are_data_and_not_templates() -> None:
    assert render("{{ x }}", x="{{ messages }}") == "{{ messages }}"


def test_one_render_leaves_nothing_for_the_next() -> None:
    chat = template("{{ x if x is defined else 'none' }}")
    assert chat.render(USER, True, {"x": 1}) == "1"
    assert chat.render(USER, True, {}) == "none"


def test_text_without_end_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="longer"):
        render("{{ 'x' * 5000000 }}")


def test_a_folder_with_the_template_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}")
    config = {"bos_token": {"content": "<s>"}, "chat_template": "config"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    chat = ChatTemplate.from_folder(tmp_path)
    assert chat is not None
    assert chat.render(USER, True, {}) == "file <s>"


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"chat_template": "{{ eos_token }}!", "eos_token": "</s>"}, "</s>!"),
        ({"chat_template": "{{ eos_token }}!", "eos_token": None}, "!"),
        ({"chat_template": None}, None),
        ({}, None),
    ],
)
def test_a_folder_with_the_template_in_its_config(
    tmp_path: Path, config: Any, wanted: str | None
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    chat = ChatTemplate.from_folder(tmp_path)
    assert (chat and chat.render(USER, True, {})) == wanted


def test_a_folder_without_a_template_has_none(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(tmp_path) is None


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% unknown %}", "{{ x | nofilter }}"])
def test_a_broken_template_names_its_folder(tmp_path: Path, source: str) -> None:
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(ModelLoadError, match=re.escape(str(tmp_path))):
        ChatTemplate.from_folder(tmp_path)


def test_a_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelLoadError, match=r"tokenizer_config\.json"):
        ChatTemplate.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ModelLoadError):
        ChatTemplate.from_folder(tmp_path)


def test_the_shipped_template_renders_a_chat(model_dir: Path) -> None:
    chat = ChatTemplate.from_folder(model_dir)
    assert chat is not None
    assert chat.render(USER, True, {}).endswith("Hi\nAssistant:")


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "\nuser:"),
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
            "{% endfor %}",
            "<|im_end|>\n<|im_start|>user",
        ),
        ("{% for m in messages %}{{ m.content }}\n\n{% endfor %}", ""),
        ("{{ messages[0].content }}", ""),
        ("{{ messages[-1].content }}", ""),
        ("{{ raise_exception('no') }}", ""),
        ("{% for m in messages %}{{ m.content | length }}{% endfor %}", ""),
    ],
)
def test_the_turn_separator_is_what_stands_between_answer_and_question(
    source: str, wanted: str
) -> None:
    assert template(source).turn_separator() == wanted


def test_the_turn_separator_is_not_fooled_by_messages_in_capitals() -> None:
    source = "{% for m in messages %}{{ m.role }}={{ m.content | lower }};{% endfor %}"
    assert template(source).turn_separator() == ";user="
