"""Calibrated runs that end before they are done: what stays, and how the next one goes on."""

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors import SafetensorError
from torch import Tensor

import compress
from compress import sequential, store
from compress.cli import compress_command
from compress.errors import CompressError
from compress.progress import NoProgress, PlainProgress
from engine.errors import ModelLoadError

MakeModel = Callable[..., Path]
RECIPE = """
version: 1
calibration: {source: generate, samples: 8, length: 32}
modifiers: [{type: gptq, scheme: w4a8}]
"""


class Phases(NoProgress):
    """Keeps the phases and the layers that were compressed."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.layers: list[str] = []

    def phase(self, phase: str, detail: str) -> None:
        self.phases.append(phase)

    def layer(self, item: int, items: int, name: str, seconds_left: float) -> None:
        self.layers.append(name)


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return str(tmp_path / "mine.yaml")


def left(folder: Path) -> set[str]:
    """Names of all files below, but for the recipe and the model."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.name for path in files if "model" not in path.parts and path.suffix != ".yaml"}


@pytest.mark.parametrize(("writes", "resumed"), [(0, []), (1, []), (2, ["layer 1"])])
def test_a_disk_that_fills_up_while_layers_are_saved(
    make_model: MakeModel,
    tmp_path: Path,
    spec: str,
    monkeypatch: pytest.MonkeyPatch,
    writes: int,
    resumed: list[str],
) -> None:
    """The first write is the text, the others are layers."""
    model, done = make_model(), []

    def full(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
        if len(done) == writes:
            path.write_bytes(b"half a file")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        done.append(path)
        save_file(tensors, path, metadata=metadata)

    save_file = store.save_file
    with monkeypatch.context() as patch:
        patch.setattr(store, "save_file", full)
        with pytest.raises(CompressError, match=r"the disk is full: name another folder") as caught:
            compress.compress(spec, model, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert left(tmp_path) == {path.with_suffix(".safetensors").name for path in done}
    again = Phases()
    compress.compress(spec, model, tmp_path / "out", progress=again)
    assert again.layers[: 2 - len(done[1:])] == (resumed or ["layer 0", "layer 1"])
    assert ("generating" in again.phases) == (writes == 0)
    assert compress.compress(spec, model, tmp_path / "whole").key
    first, second = (tmp_path / name / "model.safetensors" for name in ("out", "whole"))
    assert first.read_bytes() == second.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"mine.yaml", "model", "out", "whole"}


def test_a_disk_without_room_for_hidden_states(
    make_model: MakeModel, tmp_path: Path, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sequential, "MAPPED_BYTES", 0)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CompressError, match="the disk is full: name another folder with --out"):
        compress.compress(spec, make_model(), tmp_path / "out")
    assert left(tmp_path) == {"calibration.safetensors"}


def test_hidden_states_in_a_file_change_nothing(
    make_model: MakeModel, tmp_path: Path, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    compress.compress(spec, model, tmp_path / "memory")
    monkeypatch.setattr(sequential, "MAPPED_BYTES", 0)
    compress.compress(spec, model, tmp_path / "file")
    first, second = (tmp_path / name / "model.safetensors" for name in ("memory", "file"))
    assert first.read_bytes() == second.read_bytes()


def test_a_layer_file_that_is_damaged_is_made_anew(
    make_model: MakeModel, tmp_path: Path, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    with monkeypatch.context() as patch:
        patch.setattr(Phases, "layer", _stop)
        with pytest.raises(KeyboardInterrupt):
            compress.compress(spec, model, tmp_path / "out", progress=Phases())
    (saved,) = tmp_path.rglob("layer-00000.safetensors")
    os.truncate(saved, saved.stat().st_size // 2)
    again = Phases()
    compress.compress(spec, model, tmp_path / "out", progress=again)
    assert again.layers[0] == "layer 0"


def test_an_interrupt_says_what_is_kept(
    make_model: MakeModel, tmp_path: Path, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--recipe", spec, "--out", str(tmp_path / "out"), "--progress", "plain"]
    arguments = [str(make_model()), *options]
    with monkeypatch.context() as patch:
        patch.setattr(PlainProgress, "layer", _stop)
        done = CliRunner().invoke(compress_command, arguments)
    assert done.exit_code == 130
    (folder,) = tmp_path.glob(".out.*")
    assert done.stderr.splitlines()[-1] == (
        f"venturi: interrupted: {folder} keeps the calibration text and "
        "1 of 2 decoder layers: "
        "the same command goes on from there"
    )
    done = CliRunner().invoke(compress_command, arguments)
    assert done.exit_code == 0
    assert "generating" not in done.stderr
    assert "layer 0" not in done.stderr


def test_an_interrupt_before_anything_is_saved_keeps_nothing(
    make_model: MakeModel, tmp_path: Path, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.calibrated.generate", _stop)
    options = ["--recipe", spec, "--out", str(tmp_path / "out"), "--progress", "plain"]
    done = CliRunner().invoke(compress_command, [str(make_model()), *options])
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1] == "venturi: interrupted: nothing was written"
    assert {path.name for path in tmp_path.iterdir()} == {"mine.yaml", "model"}


def test_weights_cut_off_while_they_are_calibrated(
    make_model: MakeModel, tmp_path: Path, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    file = model / "model.safetensors"

    class Cut(NoProgress):
        def layer(self, item: int, items: int, name: str, seconds_left: float) -> None:
            data = file.read_bytes()[:-5000]
            file.unlink()  # a new file, as a copy makes it: mapped pages of the old one stay
            file.write_bytes(data)

    with pytest.raises(ModelLoadError, match=r"model\.safetensors cannot be read") as caught:
        compress.compress(spec, model, tmp_path / "out", progress=Cut())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def _stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
