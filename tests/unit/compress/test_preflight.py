"""What a run says and refuses before it begins."""

import errno
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import compress
from compress.errors import CompressError
from compress.progress import NoProgress
from engine.errors import ModelLoadError

MakeModel = Callable[..., Path]
FOUR_BITS = "{type: rtn, scheme: w4a8, group_size: 32}"
GENERATED = "calibration: {source: generate, samples: 8, length: 32}\n"


class Lines(NoProgress):
    """Keeps what was planned, and whether anything came after."""

    def __init__(self) -> None:
        self.planned: list[str] = []
        self.others: list[str] = []

    def phase(self, phase: str, detail: str) -> None:
        (self.planned if phase == "planning" else self.others).append(detail or phase)


def recipe(folder: Path, *modifiers: str, calibration: str = "") -> str:
    path = folder / "mine.yaml"
    lines = "".join(f"  - {one}\n" for one in modifiers)
    path.write_text(f"version: 1\n{calibration}modifiers:\n{lines}")
    return str(path)


def plan(model: Path, spec: str, out: Path) -> list[str]:
    lines = Lines()
    compress.compress(spec, model, out, progress=lines)
    return lines.planned


def test_layers_kernels_head_and_needs(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, spec = make_model(mlp=172, layers=3), recipe(tmp_path, FOUR_BITS)
    monkeypatch.setattr("compress.trial.resolve", lambda _: "torch")
    channels, groups, fallback, head, needs = plan(model, spec, tmp_path / "out")
    assert groups.startswith("18 linears pack-quantized 4 bit in groups of 32, executed as int4 x")
    assert groups.endswith(", slow")
    assert channels.startswith("3 linears pack-quantized 8 bit per channel, executed as int8 x")
    assert fallback.startswith("model.layers.*.mlp.down_proj (3): 8 bits per channel, since groups")
    assert head == "lm_head stays bf16, tied to model.embed_tokens, int8 when loaded"
    assert "of memory" in needs
    assert "of disk" in needs
    assert needs.endswith(" s")


def test_no_room_for_temporary_files(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("compress.trial.save_file", full)
    wanted = f"cannot write to {tempfile.gettempdir()}: the disk is full: set TMPDIR"
    with pytest.raises(CompressError, match=wanted):
        compress.compress("w8a8", make_model(), tmp_path / "out")


def test_a_failure_while_it_is_tried_out_is_no_failed_write(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("compress.artefact.try_out", fails)
    with pytest.raises(OSError, match="Input/output error"):
        compress.compress("w8a8", make_model(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_untied_head_and_layers_that_stay(make_model: MakeModel, tmp_path: Path) -> None:
    spec = recipe(tmp_path, "{type: rtn, scheme: w8a8, targets: ['*q_proj']}")
    lines = plan(make_model(tied=False), spec, tmp_path / "out")
    assert "lm_head stays bf16, int8 when loaded; 12 linears stay as they are" in lines


def test_the_kernel_is_the_one_that_serves(make_model: MakeModel, tmp_path: Path) -> None:
    from engine.config import EngineConfig
    from engine.scoring import Scorer

    lines = plan(make_model(), "w8a8", tmp_path / "out")
    with Scorer(EngineConfig(model_dir=tmp_path / "out")) as scorer:
        (kernel,) = {one for one in scorer.report.kernels if one.startswith("int8=")}
    assert lines[0].endswith(f"executed as int8 x int8 by {kernel.removeprefix('int8=')}")


@pytest.mark.parametrize("key", ["targets", "ignore"])
def test_a_pattern_that_matches_nothing(make_model: MakeModel, tmp_path: Path, key: str) -> None:
    spec = recipe(tmp_path, f"{{type: rtn, scheme: w8a8, {key}: ['*.quark_proj']}}")
    with pytest.raises(CompressError, match=rf"{key}: '\*\.quark_proj' matches no layer"):
        compress.compress(spec, make_model(), tmp_path / "out")


@pytest.mark.parametrize(
    ("free", "message"),
    [
        (20 << 20, "writing needs about .* free some, or use a larger machine"),
        (200 << 20, "calibration needs about .* lower calibration.samples"),
    ],
)
def test_memory_is_refused_before_work(
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    message: str,
) -> None:
    monkeypatch.setattr("compress.preflight.available_bytes", lambda: free)
    spec = recipe(tmp_path, "{type: gptq, scheme: w4a8}", calibration=GENERATED)
    refused(spec, make_model(), tmp_path, message)


def test_a_model_that_cannot_write_its_own_text_here(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.preflight.available_bytes", lambda: 400 << 20)
    monkeypatch.setattr("compress.estimate.sequence_bytes", lambda *_: 1 << 30)
    spec = recipe(tmp_path, "{type: gptq, scheme: w4a8}", calibration=GENERATED)
    refused(spec, make_model(), tmp_path, "generating .* give text of your own")


def test_a_small_disk_is_refused_before_work(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 << 20))
    refused("w8a8", make_model(), tmp_path, "has 5 MB free and 64 MB are needed")


def test_an_instruction_set_that_is_not_there(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.kernels.cpu.library import kernels

    kernels.cache_clear()
    monkeypatch.setenv("VENTURI_CPU_ISA", "abacus")
    with pytest.raises(ModelLoadError, match="'abacus' is unknown"):
        compress.compress("w8a8", make_model(), tmp_path / "out")
    kernels.cache_clear()


def refused(spec: str, model: Path, folder: Path, message: str) -> None:
    lines = Lines()
    with pytest.raises(CompressError, match=message) as caught:
        compress.compress(spec, model, folder / "out", progress=lines)
    assert "\n" not in str(caught.value)
    assert lines.others == [str(model)]  # hashed, and nothing else
    assert {path.name for path in folder.iterdir()} <= {model.name, "mine.yaml"}
