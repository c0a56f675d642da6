"""Layer-wise sparsities: outliers by their definition, the mean that is kept, whole jobs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress import calibrated
from compress.allocation import find_sparsities
from compress.errors import CompressError
from compress.methods import OWL_SHIFT
from compress.methods.owl import allocate, outlier_share
from compress.recipe import load

MakeModel = Callable[..., Path]
JOB = (
    "version: 1\n"
    "calibration: {source: generate, samples: 16, length: 32}\n"
    "modifiers:\n"
    "  - {type: TYPE, sparsity: 0.5, allocation: owl}\n"
)


def naive(weights: list[Tensor], norms: list[Tensor]) -> float:
    scores = [
        abs(float(value)) * float(norm_K[k])
        for w_NK, norm_K in zip(weights, norms, strict=True)
        for row in w_NK
        for k, value in enumerate(row)
    ]
    mean = sum(scores) / len(scores)
    return sum(score > 5 * mean for score in scores) / len(scores)


def test_outliers_are_counted_over_all_linears_of_a_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(9, 7, generator=generator), torch.randn(5, 11, generator=generator)]
    norms = [torch.rand(7, generator=generator), torch.rand(11, generator=generator)]
    weights[0][2, 3], norms[1][4] = 60.0, 9.0
    wanted = naive(weights, norms)
    assert 0 < wanted < 0.2
    assert outlier_share(weights, norms) == pytest.approx(wanted)
    assert outlier_share([torch.zeros(3, 3)], [torch.ones(3)]) == 0


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("sizes", [[10, 10, 10, 10], [100, 1, 1, 50]])
def test_layers_with_more_outliers_are_pruned_less(sizes: list[int], sparsity: float) -> None:
    outliers = [0.01, 0.04, 0.02, 0.01]
    found = allocate(outliers, sizes, sparsity)
    assert sum(s * n for s, n in zip(found, sizes, strict=True)) / sum(sizes) == pytest.approx(
        sparsity
    )
    assert found[1] < found[2] < found[0] == found[3]
    assert found[0] - found[1] == pytest.approx(OWL_SHIFT)
    assert all(abs(share - sparsity) < OWL_SHIFT for share in found)


@pytest.mark.parametrize("outliers", [[0.3], [0.0, 0.0, 0.0]])
def test_equal_layers_are_pruned_equally(outliers: list[float]) -> None:
    assert allocate(outliers, [3] * len(outliers), 0.5) == [0.5] * len(outliers)


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    found = json.loads((folder / "venturi.json").read_text())
    return {row["name"]: row for row in found["layers"]}


@pytest.mark.parametrize("kind", ["wanda", "sparsegpt", "magnitude"])
def test_each_layer_has_its_own_sparsity(make_model: MakeModel, tmp_path: Path, kind: str) -> None:
    def outliers(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if ".layers.1." in name and name.endswith("proj.weight"):
                tensor[:2, :2] *= 100

    out = tmp_path / "out"
    compress.compress(write(tmp_path, JOB.replace("TYPE", kind)), make_model(change=outliers), out)
    found = rows(out)
    wanted = [found[f"model.layers.{i}.mlp.up_proj"]["sparsity_wanted"] for i in range(2)]
    assert wanted == pytest.approx([0.5 + OWL_SHIFT / 2, 0.5 - OWL_SHIFT / 2])
    for name, row in found.items():
        if row["sparsity_wanted"] is not None:
            assert row["sparsity_wanted"] == wanted[int(name.split(".")[2])]
            assert row["sparsity"] == pytest.approx(row["sparsity_wanted"], abs=0.01)
    totals = json.loads((out / "venturi.json").read_text())["totals"]
    assert totals["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_other_pruners_keep_theirs(make_model: MakeModel, tmp_path: Path) -> None:
    text = JOB.replace("TYPE", "wanda").replace("owl}", 'owl, targets: ["*.mlp.*"]}')
    text += '  - {type: wanda, sparsity: 0.25, targets: ["*.self_attn.*"]}\n'
    text += '  - {type: rtn, scheme: w8a8, targets: ["*.mlp.*"]}\n'
    compress.compress(write(tmp_path, text), make_model(), tmp_path / "out")
    found = rows(tmp_path / "out")
    assert found["model.layers.0.self_attn.q_proj"]["sparsity_wanted"] == 0.25
    both = [found[f"model.layers.{i}.mlp.down_proj"] for i in range(2)]
    assert sum(row["sparsity_wanted"] for row in both) == pytest.approx(1.0)
    assert both[0]["sparsity_wanted"] != both[1]["sparsity_wanted"]
    assert all(row["sparsity"] >= row["sparsity_wanted"] - 0.01 for row in both)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ('sparsity: 0.5, structure: "2:4", allocation: owl', "all layers have the same 2:4"),
        ("sparsity: 0.9, allocation: owl", "a sparsity from 0.16 to 0.84"),
        ("sparsity: [0.5, 0.5], allocation: owl", "sparsity must be"),
        ("sparsity: 0.5, allocation: owls", "did you mean 'owl'?"),
        ("allocation: owl", "the key 'sparsity' is missing"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, keys: str, message: str) -> None:
    path = write(tmp_path, f"version: 1\nmodifiers:\n  - {{type: wanda, {keys}}}\n")
    with pytest.raises(CompressError) as caught:
        load(Path(path))
    assert message in str(caught.value)
    assert ":3: " in str(caught.value)


def test_uniform_is_the_default(tmp_path: Path) -> None:
    texts = ["{type: wanda, sparsity: 0.5}", "{type: wanda, sparsity: 0.5, allocation: uniform}"]
    plain, uniform = (
        load(Path(write(tmp_path, f"version: 1\nmodifiers: [{one}]\n"))) for one in texts
    )
    assert plain == uniform
    assert plain.canonical_json() == uniform.canonical_json()


def test_an_interrupted_run_keeps_its_sparsities(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = write(tmp_path, JOB.replace("TYPE", "wanda")), make_model()
    whole, out = tmp_path / "whole", tmp_path / "out"
    compress.compress(path, model, whole)
    found: list[Tensor] = []

    def once(*arguments: Any) -> Tensor:
        assert not found, "found already"
        found.append(find_sparsities(*arguments))
        return found[0]

    def fail(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrated, "find_sparsities", once)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(calibrated, "compress_block", fail)
        with pytest.raises(KeyboardInterrupt):
            compress.compress(path, model, out)
    compress.compress(path, model, out)
    assert len(found) == 1
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
