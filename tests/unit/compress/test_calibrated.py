"""Calibrated jobs from recipe to loaded artefact; resume; what calibration may do wrong."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress import calibrated
from compress.errors import CompressError
from compress.export import export
from compress.methods.hessian import Factor
from compress.progress import NoProgress
from compress.sources import MANIFEST_NAME
from engine.config import CacheConfig, EngineConfig, KernelConfig
from engine.formats.checkpoint import Checkpoint
from engine.scoring import Scorer

MakeModel = Callable[..., Path]
Q_PROJ = "model.layers.0.self_attn.q_proj"
CALIBRATION = "calibration: {source: generate, samples: 24, length: 32}\n"
GPTQ = "{type: gptq, scheme: w4a8, group_size: 32, scale: mse}"


def recipe(folder: Path, *modifiers: str, calibration: str = CALIBRATION) -> str:
    path = folder / "mine.yaml"
    lines = "".join(f"  - {one}\n" for one in modifiers)
    path.write_text(f"version: 1\n{calibration}modifiers:\n{lines}")
    return str(path)


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text())
    return found


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in manifest(folder)["layers"]}


def served(folder: Path) -> dict[str, tuple[str, str]]:
    """Module -> what is in memory, and what is multiplied, in an engine that loads it."""
    config = EngineConfig(
        model_dir=folder,
        cache=CacheConfig(block_size=16, blocks=4),
        kernels=KernelConfig(threads=1, allow_slow=True),
    )
    with Scorer(config) as scorer:
        assert bool(scorer.logits([0, 1, 2, 3]).isfinite().all())
        return {row.name: (row.storage, row.execution) for row in scorer.report.layers}


def weight(folder: Path, module: str = Q_PROJ) -> Tensor:
    """The linear's float weight as the compressed-tensors package reads it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model(torch.tensor([[0, 5, 6]]))
    found: Tensor = model.get_submodule(module).weight.detach()
    return found


@pytest.mark.parametrize(
    ("modifier", "storage", "execution"),
    [
        (GPTQ, "int4", "int4 x int8"),
        ("{type: awq, scheme: w4a16}", "int4", "int4 x float32"),
        ("{type: rtn, scheme: w4a16, symmetric: false}", "int4", "int4 x float32"),
        ("{type: rtn, scheme: w8a16}", "int8", "int8 x float32"),
        ("{type: gptq, scheme: w8a8}", "int8", "int8 x int8"),
        ("{type: rtn, scheme: fp8}", "float8_e4m3", "float8_e4m3 x float8_e4m3"),
        ("{type: gptq, scheme: fp8}", "float8_e4m3", "float8_e4m3 x float8_e4m3"),
        ("{type: awq, scheme: fp8}", "float8_e4m3", "float8_e4m3 x float8_e4m3"),
    ],
)  # fmt: skip
def test_schemes_are_stored_and_executed_as_they_say(
    make_model: MakeModel, tmp_path: Path, modifier: str, storage: str, execution: str
) -> None:
    calibration = "" if "rtn" in modifier else CALIBRATION
    out = tmp_path / "out"
    compress.compress(recipe(tmp_path, modifier, calibration=calibration), make_model(), out)
    found = served(out)
    assert found[Q_PROJ] == (storage, execution)
    assert found["lm_head"][0] == ("int8" if "a8" in modifier else "float32")
    row = rows(out)[Q_PROJ]
    assert row["execution"].startswith(execution)
    assert row["bits"] < (4.7 if "w4" in modifier else 8.5)
    error, baseline = row["output_error"], row["baseline_error"]
    assert (error is None) == (calibration == "") or error <= baseline


def test_transformers_reads_what_the_engine_reads(make_model: MakeModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress.compress(recipe(tmp_path, GPTQ), make_model(), out)
    from engine.formats import pack_quantized

    checkpoint = Checkpoint.open(out)
    suffixes = ("weight_packed", "weight_scale", "weight_shape")
    tensors = {suffix: checkpoint.tensor(f"{Q_PROJ}.{suffix}") for suffix in suffixes}
    ours = pack_quantized.unpack(tensors).dequantize()
    assert torch.allclose(weight(out), ours, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("structure", "n", "m"), [("unstructured", 0, 0), ('"2:4"', 2, 4)])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "fp8"])
def test_the_mask_is_in_the_file(
    make_model: MakeModel, tmp_path: Path, structure: str, n: int, m: int, scheme: str
) -> None:
    prune = f"{{type: sparsegpt, sparsity: 0.5, structure: {structure}}}"
    out = tmp_path / "out"
    both = recipe(tmp_path, prune, f"{{type: gptq, scheme: {scheme}}}")
    compress.compress(both, make_model(), out)
    row = rows(out)[Q_PROJ]
    assert row["sparsity_wanted"] == 0.5
    assert row["sparsity"] >= 0.5
    assert row["method"] == "sparsegpt+gptq"
    assert manifest(out)["totals"]["sparsity"] >= 0.5
    plain = out  # FP8 keeps its zeros
    if scheme != "fp8":
        plain = tmp_path / "plain"
        export(out, plain, NoProgress())
    zeros = weight(plain) == 0
    assert zeros.float().mean() >= 0.5
    if m:
        assert (zeros.unflatten(1, (-1, m)).sum(2) >= m - n).all()


def test_levels_by_layer_and_pruning_alone(make_model: MakeModel, tmp_path: Path) -> None:
    prune = "{type: wanda, sparsity: [0.25, 0.75]}"
    out = tmp_path / "out"
    compress.compress(recipe(tmp_path, prune), make_model(), out)
    found = rows(out)
    assert found[Q_PROJ]["sparsity"] == pytest.approx(0.25, abs=0.01)
    assert found[Q_PROJ.replace(".0.", ".1.")]["sparsity"] == pytest.approx(0.75, abs=0.01)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert served(out)[Q_PROJ] == ("float32", "float32 x float32")


def test_a_scaling_changes_no_function(make_model: MakeModel, tmp_path: Path) -> None:
    def outliers(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"][::16] = 60.0

    model, out = make_model(change=outliers, dtype=torch.float32), tmp_path / "out"
    compress.compress(
        recipe(tmp_path, "{type: smoothquant}", "{type: rtn, scheme: w8a8}"), model, out
    )
    name = "model.layers.0.input_layernorm.weight"
    before, after = Checkpoint.open(model).tensor(name), Checkpoint.open(out).tensor(name)
    assert not torch.equal(before, after)
    original = Checkpoint.open(model).tensor(f"{Q_PROJ}.weight") * before
    assert torch.allclose(weight(out) * after, original, atol=0.02 * float(original.abs().max()))


def test_rows_that_groups_do_not_divide(make_model: MakeModel, tmp_path: Path) -> None:
    model, out = make_model(mlp=172), tmp_path / "out"
    compress.compress(recipe(tmp_path, GPTQ), model, out)
    found = served(out)
    assert found["model.layers.0.mlp.down_proj"] == ("int8", "int8 x int8")
    assert found["model.layers.0.mlp.up_proj"] == ("int4", "int4 x int8")
    row = rows(out)["model.layers.0.mlp.down_proj"]
    assert row["storage"] == "pack-quantized 8 bit per channel"
    assert torch.isfinite(weight(out, "model.layers.0.mlp.down_proj")).all()


def test_tied_and_untied_heads(make_model: MakeModel, tmp_path: Path) -> None:
    for tied in (True, False):
        out = tmp_path / f"out-{tied}"
        compress.compress(recipe(tmp_path, GPTQ), make_model(f"m-{tied}", tied=tied), out)
        names = Checkpoint.open(out).tensors
        assert ("lm_head.weight" in names) != tied
        assert names["model.embed_tokens.weight"].dtype == "BF16"
        assert served(out)["lm_head"] == ("int8", "int8 x int8")


def test_dead_channels(make_model: MakeModel, tmp_path: Path) -> None:
    def kill(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.input_layernorm.weight"][5:9] = 0

    out = tmp_path / "out"
    compress.compress(recipe(tmp_path, GPTQ), make_model(change=kill), out)
    assert manifest(out)["summary"]["kept"]["gptq"] > 0
    assert served(out)


def test_too_few_tokens_climb_the_ladder(make_model: MakeModel, tmp_path: Path) -> None:
    few = "calibration: {source: generate, samples: 1, length: 32}\n"
    out = tmp_path / "out"
    compress.compress(recipe(tmp_path, GPTQ, calibration=few), make_model(), out)
    assert manifest(out)["summary"]["damping"].keys() == {"damping 0.1"}


def test_hessians_that_cannot_be_used_fail_the_run(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.methods.inputs.factor", lambda *_: Factor(None, "none"))
    with pytest.raises(CompressError, match="14 of 14 Hessians could not be factored"):
        compress.compress(recipe(tmp_path, GPTQ), make_model(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_activations_that_are_not_finite(make_model: MakeModel, tmp_path: Path) -> None:
    def blow_up(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"].fill_(3e38)

    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "x"}\n')
    model = make_model(change=blow_up)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrated, "generate", lambda *_, **__: torch.arange(64).view(2, 32))
        with pytest.raises(CompressError, match="NaN or infinite inputs: give other calibration"):
            compress.compress(recipe(tmp_path, GPTQ), model, tmp_path / "out")


def test_hooks_that_never_fire(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.blocks._Observed.__call__", lambda self, x: self.linear(x))
    with pytest.raises(CompressError, match=r"layers\.0.*calibration never reached this layer"):
        compress.compress(recipe(tmp_path, GPTQ), make_model(), tmp_path / "out")


@pytest.mark.parametrize(
    ("modifiers", "message"),
    [
        ([GPTQ, GPTQ], "two modifiers target"),
        (["{type: wanda, sparsity: 0.5}"] * 2, "two modifiers prune"),
        ([GPTQ, "{type: wanda, sparsity: 0.5}"], "wanda comes too late"),
        (["{type: wanda, sparsity: [0.5]}"], "1 levels for 2 decoder layers"),
        (['{type: wanda, sparsity: 0.5, structure: "4:2"}'], "neither unstructured nor N:M"),
        (['{type: wanda, sparsity: 0.5, structure: "1:4"}'], "no sparsity of 0.5"),
        (['{type: wanda, sparsity: 0.6, structure: "2:5"}'], "2:5 does not divide the 96"),
    ],
)
def test_what_the_plan_refuses(
    make_model: MakeModel, tmp_path: Path, modifiers: list[str], message: str
) -> None:
    with pytest.raises(CompressError, match=message):
        compress.compress(recipe(tmp_path, *modifiers), make_model(), tmp_path / "out")


def test_too_little_memory(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.preflight.available_bytes", lambda: 5 << 20)
    with pytest.raises(CompressError, match="of memory and 5 MB are free"):
        compress.compress(recipe(tmp_path, GPTQ), make_model(), tmp_path / "out")


def test_text_of_the_user(mini: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("User: How do I list files?\nAssistant: ls\0" * 12)
    (tmp_path / "b.jsonl").write_text('{"text": "Two and two are four."}\n' * 12)
    few = "calibration: {source: file, path: [a.txt, b.jsonl], samples: 3, length: 32}\n"
    path = recipe(tmp_path, "{type: gptq, scheme: w8a8, targets: ['*.0.*']}", calibration=few)
    first = compress.compress(path, mini, tmp_path / "out")
    assert first.calibration is not None
    assert (first.calibration["source"], first.calibration["samples"]) == ("file", 3)
    ids = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert len(ids) == 3
    (tmp_path / "a.txt").write_text("Other text, which gives another artefact. " * 20)
    assert compress.compress(path, mini, tmp_path / "out").key != first.key
    (tmp_path / "b.jsonl").write_text('{"no": 1}\n')
    with pytest.raises(CompressError, match=r'b\.jsonl:1: must be an object with "text"'):
        compress.compress(path, mini, tmp_path / "out")
    (tmp_path / "b.jsonl").write_text("")
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(CompressError, match="calibration needs 3 x 32 tokens"):
        compress.compress(path, mini, tmp_path / "out")


# Stays after the first decoder layer until it is killed.
STUCK = """
import runpy, time
from compress.progress import JsonProgress
layer = JsonProgress.layer
def stick(self, item, *rest):
    layer(self, item, *rest)
    time.sleep(60)
JsonProgress.layer = stick
runpy.run_module("compress", run_name="__main__")
"""


def test_killed_half_way_goes_on_and_gives_the_same_bits(
    make_model: MakeModel, tmp_path: Path
) -> None:
    model, path = make_model(), recipe(tmp_path, GPTQ)
    command = [str(model), "--recipe", path, "--progress", "json", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole" / "out", tmp_path / "killed" / "out"
    run: list[str] = [sys.executable, "-m", "compress", *command]
    subprocess.run([*run, str(whole)], check=True, capture_output=True, env=environment)
    stuck = [sys.executable, "-c", STUCK, *command, str(killed)]
    with subprocess.Popen(stuck, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "layer":
                process.send_signal(signal.SIGKILL)
    assert not killed.exists()
    done = subprocess.run(
        [*run, str(killed)], check=True, capture_output=True, env=environment, text=True
    )
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["item"] for event in events if event["event"] == "layer"] == [2]
    assert "generating" not in [event.get("phase") for event in events]
    for name in ("model.safetensors", "config.json", "calibration.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert [file.name for file in killed.parent.iterdir()] == ["out"]
