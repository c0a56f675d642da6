"""The tokenizer of a folder: there and back, its files, and folders without one."""

import hashlib
import shutil
from pathlib import Path

import pytest

from engine.client.tokenizer import Tokenizer
from engine.errors import InvalidRequest, ModelLoadError


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_folder(model_dir)


@pytest.mark.parametrize("text", ["", " ", "Once upon a time", "漢字 👍🏽\n\te\u0301", "\ufffd"])
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_hidden_unless_asked_for(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("The end."), 0]
    assert tokenizer.decode(ids) == "The end."
    assert tokenizer.decode(ids, skip_special_tokens=False) == "The end.<|endoftext|>"


def test_long_text_is_not_cut(tokenizer: Tokenizer) -> None:
    text = "a cat and a dog " * 400
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_chat_ends_where_the_next_turn_begins(tokenizer: Tokenizer) -> None:
    assert tokenizer.has_chat_template
    assert tokenizer.chat_stop == "\nUser:"


def test_files_are_those_of_the_folder(tokenizer: Tokenizer, model_dir: Path) -> None:
    files = {file.name: file for file in tokenizer.files()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= files.keys()
    for name, file in files.items():
        data = (model_dir / name).read_bytes()
        assert (file.data, file.sha256) == (data, hashlib.sha256(data).hexdigest())
    assert not any(name.endswith(".safetensors") for name in files)


def test_files_are_as_they_were_when_the_tokenizer_was_read(
    model_dir: Path, tmp_path: Path
) -> None:
    shutil.copy(model_dir / "tokenizer.json", tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("changed")
    (file,) = tokenizer.files()
    assert file.data == (model_dir / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "text", ["a" * 999, "the cat sat on the mat " * 40, "漢字" * 300, " " * 999]
)
def test_no_token_has_more_characters_than_the_longest(tokenizer: Tokenizer, text: str) -> None:
    assert len(tokenizer.encode(text)) * tokenizer.longest_token >= len(text)


def test_a_folder_without_a_template_refuses_chats(model_dir: Path, tmp_path: Path) -> None:
    shutil.copy(model_dir / "tokenizer.json", tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert not tokenizer.has_chat_template
    assert tokenizer.chat_stop == ""
    with pytest.raises(InvalidRequest):
        tokenizer.render([], True, {})


@pytest.mark.parametrize("data", [None, b"", b"{}", b"[1]", b"\xff\x00", b'{"model": {}}'])
def test_a_missing_or_broken_file_is_named(tmp_path: Path, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
