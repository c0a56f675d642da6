"""Sparse artefacts: their size and what they say, and the same with explicit zeros."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import compress
from compress.cli import export_command
from compress.errors import CompressError
from compress.export import export
from compress.progress import NoProgress
from compress.sources import MANIFEST_NAME
from engine.config import CacheConfig, EngineConfig, KernelConfig
from engine.formats.checkpoint import Checkpoint
from engine.scoring import Scorer

MakeModel = Callable[..., Path]
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def sparse(make_model: MakeModel, tmp_path: Path) -> Callable[..., Path]:
    """sparse(structure, scheme, targets) -> artefact."""

    def make(structure: str = "unstructured", scheme: str = "w8a8", targets: str = "*") -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(
            "version: 1\ncalibration: {source: generate, samples: 24, length: 32}\nmodifiers:\n"
            f'  - {{type: magnitude, sparsity: 0.5, structure: "{structure}", '
            f'targets: ["{targets}"]}}\n'
            f"  - {{type: gptq, scheme: {scheme}}}\n"
        )
        model = make_model(hidden=128, mlp=192)
        compress.compress(str(path), model, tmp_path / "artefact")
        return tmp_path / "artefact"

    return make


def exported(artefact: Path) -> Path:
    out = artefact.with_name("plain")
    done = CliRunner().invoke(export_command, [str(artefact), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{out}\n"
    return out


def logits(folder: Path) -> Tensor:
    config = EngineConfig(
        model_dir=folder,
        cache=CacheConfig(block_size=16, blocks=4),
        kernels=KernelConfig(threads=1),
    )
    with Scorer(config) as scorer:
        return scorer.logits([0, 1, 2, 3, 50])


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text())
    return found


@pytest.mark.parametrize(
    ("structure", "scheme", "targets", "bits"),
    [
        ("unstructured", "w8a8", "*", 5.7),
        ("2:4", "w8a8", "*", 5.2),
        ("unstructured", "w4a8", "*", 4.1),
        ("2:4", "w4a16", "*", 3.6),
        ("unstructured", "w8a16", "re:.*mlp.*", 5.7),
    ],
)
def test_it_is_smaller_and_the_same(
    sparse: Callable[..., Path], structure: str, scheme: str, targets: str, bits: float
) -> None:
    artefact = sparse(structure, scheme, targets)
    plain = exported(artefact)
    assert torch.equal(logits(artefact), logits(plain))
    found, again = manifest(artefact), manifest(plain)
    rows = {row["name"]: row for row in found["layers"]}
    mlp = rows["model.layers.0.mlp.down_proj"]
    assert mlp["storage"].endswith(f", {structure} mask and kept values")
    assert mlp["bits"] < bits
    assert (Q_PROJ in rows and "mask" in rows[Q_PROJ]["storage"]) == (targets == "*")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (artefact, plain)]
    assert sizes[0] < sizes[1]
    assert found["totals"]["bytes"] < again["totals"]["bytes"]
    for one in (found, again):
        nbytes = sum(row["bytes"] for row in one["layers"] if row["method"] != "none")
        weights = one["totals"]["compressed_parameters"]
        wanted = pytest.approx(8 * nbytes / weights, abs=1e-3)
        assert one["totals"]["effective_bits_per_weight"] == wanted
    assert found["key"] != again["key"]
    assert not any(name.endswith("weight_bitmask") for name in Checkpoint.open(plain).tensors)
    again_mlp = next(row for row in again["layers"] if row["name"] == mlp["name"])
    assert again_mlp["storage"].endswith(", explicit zeros")
    assert again["files"] == {
        path.name: path.stat().st_size for path in plain.iterdir() if path.name != MANIFEST_NAME
    }


def test_a_bias_is_no_part_of_a_layers_bytes(make_model: MakeModel, tmp_path: Path) -> None:
    def biased(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "self_attn" in name]:
            bias = torch.full((128,), 0.01, dtype=torch.bfloat16)
            tensors[name.replace(".weight", ".bias")] = bias

    model = make_model(hidden=128, mlp=192, change=biased)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "version: 1\nmodifiers:\n"
        "  - {type: magnitude, sparsity: 0.5, structure: unstructured}\n"
        "  - {type: rtn, scheme: w8a8}\n"
    )
    compress.compress(str(recipe), model, tmp_path / "artefact")
    plain = exported(tmp_path / "artefact")
    row = next(row for row in manifest(plain)["layers"] if row["name"] == Q_PROJ)
    checkpoint = Checkpoint.open(plain)
    assert f"{Q_PROJ}.bias" in checkpoint.tensors
    parts = [f"{Q_PROJ}.weight", f"{Q_PROJ}.weight_scale"]
    assert row["bytes"] == sum(checkpoint.info(name).nbytes for name in parts)


def test_a_failed_trial_is_not_blamed_on_the_folder(
    sparse: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    artefact = sparse()
    with monkeypatch.context() as patch:
        patch.setattr("compress.export.try_out", full)
        with pytest.raises(OSError, match="No space left"):
            export(artefact, tmp_path / "plain", NoProgress())
    monkeypatch.setattr("compress.export.publish", full)
    with pytest.raises(CompressError, match="the disk is full: name another folder with --out"):
        export(artefact, tmp_path / "plain", NoProgress())
    assert {path.name for path in tmp_path.iterdir()} == {"mine.yaml", "model", "artefact"}


def test_others_refuse_the_artefact_and_load_the_plain_one(sparse: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    artefact = sparse("2:4")
    with pytest.raises(ValueError, match="venturi-sparse-int-quantized"):
        AutoModelForCausalLM.from_pretrained(artefact)
    plain = exported(artefact)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    with torch.no_grad():
        model(torch.tensor([[0, 5, 6]]))
    weight = model.get_submodule(Q_PROJ).weight
    q_NK = Checkpoint.open(plain).tensor(f"{Q_PROJ}.weight")
    assert torch.equal(weight == 0, q_NK == 0)
    assert (q_NK.unflatten(1, (-1, 4)) == 0).sum(2).min() >= 2


def test_what_has_nothing_to_export_is_refused(
    make_model: MakeModel, sparse: Callable[..., Path], tmp_path: Path
) -> None:
    artefact, model = sparse(), make_model("other")
    for source, out, message in (
        (model, tmp_path / "new", "no artefact with sparse weights"),
        (artefact, artefact, "is the artefact itself"),
        (artefact, model, "is not a Venturi artefact"),
        (tmp_path / "nothing", tmp_path / "new", "is not a folder"),
    ):
        done = CliRunner().invoke(export_command, [str(source), "--out", str(out)])
        assert done.exit_code == 2
        assert message in done.stderr
        assert not (tmp_path / "new").exists()
