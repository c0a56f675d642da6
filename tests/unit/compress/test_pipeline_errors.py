"""What the pipeline refuses, and that nothing is left behind then."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import compress
from compress import artefact
from compress.errors import CompressError
from engine.errors import ModelLoadError

MakeModel = Callable[..., Path]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def break_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return change


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (truncate, "is truncated"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "model.safetensors").unlink(), ".bin, .pt and .gguf files are not read"),
        (lambda f: (f / "model.safetensors").write_bytes(b"abc"), "truncated or not a safetensors"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "a JSON object"),
        (break_config(quantization_config={}), "compressed already"),
        (break_config(num_hidden_layers=3), "asks for 3 layers, the weights have 2"),
        (break_config(num_hidden_layers="2"), "num_hidden_layers must be a whole number"),
        (break_config(num_hidden_layers=1), "asks for 1 layers, the weights have 2"),
        (break_config(architectures=["BertModel"]), "supported: "),
        (lambda f: (f / "tokenizer.json").unlink(), "AutoTokenizer, use_fast=True"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json is broken"),
        (lambda f: (f / "chat_template.jinja").write_text("{%"), "the chat template is broken"),
        (lambda f: (f / "generation_config.json").write_text('{"stop_strings": 1}'), "stop_str"),
        (shutil.rmtree, "is not a folder"),
    ],
)
def test_broken_folders(
    make_model: MakeModel, tmp_path: Path, breakage: Callable[[Path], None], message: str
) -> None:
    model = make_model()
    breakage(model)
    with pytest.raises((CompressError, ModelLoadError)) as caught:
        compress.compress("w8a8", model, tmp_path / "out")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path != model]


def poison(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    return change


def retype(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q_PROJ}.weight"] = tensors[f"{Q_PROJ}.weight"].to(torch.int8)


def rename(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("model.layers", "transformer.h")] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (poison(f"{Q_PROJ}.weight", float("nan")), f"{Q_PROJ}.weight has NaN or infinite"),
        (poison(f"{Q_PROJ}.weight", float("-inf")), f"{Q_PROJ}.weight has NaN or infinite"),
        (poison("model.norm.weight", float("inf")), "model.norm.weight has NaN or infinite"),
        (retype, f"{Q_PROJ}.weight is I8"),
        (rename, "asks for 2 layers, the weights have 0"),
    ],
)
def test_broken_weights(
    make_model: MakeModel,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], None],
    message: str,
) -> None:
    model = make_model(change=change)
    with pytest.raises(CompressError, match=message):
        compress.compress("w8a8", model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_modifiers_on_one_layer(make_model: MakeModel, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    step = "- {type: rtn, scheme: w8a8}\n"
    recipe.write_text(f"version: 1\nmodifiers:\n{step}{step}")
    with pytest.raises(CompressError, match=r"two modifiers target model\.layers\.0"):
        compress.compress(str(recipe), make_model(), tmp_path / "out")


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_half_way(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.host_speed._FILE_BYTES", 4096)
    model = make_model(vocab=1500)  # more than what a trial writes
    with (
        file_size_limit(160_000),
        pytest.raises(CompressError, match=r"the limit on file sizes is reached.*--out"),
    ):
        compress.compress("w8a8", model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_fills_up(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CompressError, match="the disk is full"):
        compress.compress("w8a8", make_model(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_is_too_small(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 << 20))
    with pytest.raises(CompressError, match="has 5 MB free and 64 MB are needed"):
        compress.compress("w8a8", make_model(), tmp_path / "out")


@pytest.mark.parametrize("parent", ["file", "/proc/venturi"])
def test_an_unwritable_place(make_model: MakeModel, tmp_path: Path, parent: str) -> None:
    model = make_model()
    (tmp_path / "file").touch()
    with pytest.raises(CompressError, match=r"cannot write to .*: name another folder with --out"):
        compress.compress("w8a8", model, tmp_path / parent / "out")


def test_a_bit_that_flips_on_the_disk(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flip(self: artefact.ArtefactWriter) -> None:
        file = self._folder / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        write_files(self)

    write_files = artefact.ArtefactWriter.write_files
    monkeypatch.setattr(artefact.ArtefactWriter, "write_files", flip)
    with pytest.raises(CompressError, match="was read back with other bits"):
        compress.compress("w8a8", make_model(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_meanwhile(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    monkeypatch.setattr(
        artefact.ArtefactWriter, "verify", lambda _: (model / "tokenizer.json").write_text("{ }")
    )
    with pytest.raises(CompressError, match=r"tokenizer\.json changed while"):
        compress.compress("w8a8", model, tmp_path / "out")


def test_files_that_are_not_the_artefacts_own_are_not_lost(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    model, out = make_model(), tmp_path / "out"
    compress.compress("w8a8", model, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CompressError, match=r"notes\.txt"):
        compress.compress("w8a8", model, out)
    assert (out / "notes.txt").read_text() == "mine"
