"""Sparse layers run without their zeros only where that was measured to be faster."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.formats import sparse
from engine.formats.checkpoint import read_json
from engine.formats.grouped import GroupedWeight
from engine.formats.int_quantized import Int8Weight, config_group
from engine.kernels.cpu.linear import PackedInt8Linear
from engine.kernels.cpu.sparse import PackedSparseLinear
from engine.layers import speed_gate
from engine.layers.linear import Int8Linear, Split, make_fused, make_linear
from engine.layers.speed_gate import SpeedGate
from engine.layers.weight import SparseWeight
from engine.loader import LoadedModel, load
from engine.self_test import check_linear


def weight(N: int = 40, K: int = 70) -> SparseWeight:
    q_NK = torch.randint(-128, 128, (N, K), dtype=torch.int8)
    q_NK *= torch.rand(N, K) < 0.5
    return SparseWeight(Int8Weight(q_NK, torch.rand(N)))


def measured(monkeypatch: pytest.MonkeyPatch, one: float, eight: float) -> list[tuple[int, int]]:
    """The gate finds these speed-ups; returns (out-features, copies) of what it asks about."""
    asked = []

    def speed_ups(linear: PackedSparseLinear, copies: int) -> dict[int, float]:
        asked.append((linear.outs, copies))
        return {1: one, 8: eight}

    monkeypatch.setattr(speed_gate, "speed_ups", speed_ups)
    return asked


@pytest.mark.parametrize(
    ("one", "eight", "wins"), [(1.4, 1.3, True), (1.04, 2.0, False), (2.0, 0.99, False)]
)
def test_it_takes_what_is_faster_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    one: float,
    eight: float,
    wins: bool,
) -> None:
    asked, gate = measured(monkeypatch, one, eight), SpeedGate(40 * 70 * 5)
    first, bias_N = weight(), torch.randn(40)
    with caplog.at_level(logging.INFO):
        found = [gate.choose(make_linear(w, "cpu", bias_N)) for w in (first, weight())]
    assert asked == [(40, 5)]
    assert all(isinstance(x, PackedSparseLinear if wins else PackedInt8Linear) for x in found)
    x_MK = torch.randn(3, 70)
    assert torch.equal(found[0](x_MK), PackedInt8Linear.pack(first.weight, bias_N)(x_MK))
    how = "without its zeros" if wins else "dense"
    said = f"sparse 40x70={how} (measured {one:.2f}x at 1, {eight:.2f}x at 8)"
    assert gate.verdicts == (said,)
    assert [record.message for record in caplog.records] == [said]
    for linear in found:
        check_linear(linear)


def test_other_layers_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, gate = measured(monkeypatch, 0.5, 0.5), SpeedGate(0)
    linear = make_linear(weight().weight, "cpu")
    assert gate.choose(linear) is linear
    assert asked == []


def test_a_split_layer_is_asked_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, gate = measured(monkeypatch, 0.5, 0.5), SpeedGate(1)
    parts = (make_linear(weight(), "cpu"), make_linear(weight(8), "cpu"))
    found = gate.choose(Split(parts))
    assert isinstance(found, Split)
    assert all(isinstance(part, PackedInt8Linear) for part in found.parts)
    assert asked == [(40, 1), (8, 1)]


def test_what_is_measured_is_a_ratio() -> None:
    linear = PackedSparseLinear.pack(weight(64, 256).weight)
    found = speed_gate.speed_ups(linear, 3)
    assert found.keys() == {1, 8}
    assert all(ratio > 0 for ratio in found.values())


def test_copies_lie_apart() -> None:
    linear = PackedSparseLinear.pack(weight().weight)
    copy, x_MK = linear.copy(), torch.randn(3, 70)
    wanted = linear(x_MK)
    linear.records.zero_()
    assert torch.equal(copy(x_MK), wanted)


def test_layers_that_share_an_input_are_fused() -> None:
    a, b = weight(40), weight(24)
    x_MK = torch.randn(3, 70)
    wanted = torch.cat([make_linear(one.weight, "cpu")(x_MK) for one in (a, b)], 1)
    for weights, kind in (((a, b), PackedSparseLinear), ((a, b.weight), PackedInt8Linear)):
        found = make_fused(weights, "cpu")
        assert isinstance(found, kind)
        assert torch.equal(found(x_MK), wanted)
    int4 = GroupedWeight(torch.zeros(8, 70, dtype=torch.int8), torch.ones(8, 1), None, 96)
    mixed = make_fused((a, int4), "cpu")
    assert isinstance(mixed, Split)
    assert isinstance(mixed.parts[0], PackedInt8Linear)
    assert isinstance(make_fused((a, b), "torch"), Int8Linear)


def pruned(model_dir: Path, folder: Path) -> Path:
    """The model with all decoder linears at half of their weights, in the sparse format."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(model_dir / "model.safetensors").items():
        if "_proj.weight" not in name:
            tensors[name] = tensor
            continue
        scale_N = tensor.float().abs().amax(1) / 127.5
        q_NK = (tensor.float() / scale_N[:, None]).round().clamp(-128, 127).to(torch.int8)
        q_NK[:, ::2] = 0
        packed = sparse.pack(Int8Weight(q_NK, scale_N), "unstructured", packed=False)
        tensors |= {f"{name.removesuffix('weight')}{part}": one for part, one in packed.items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    group = sparse.config_group(config_group(["Linear"]), "unstructured")
    quantization = {"quant_method": "compressed-tensors", "format": group["format"]}
    quantization |= {"config_groups": {"group_0": group}}
    config = read_json(model_dir / "config.json") | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("wins", [True, False])
def test_a_model_is_loaded_as_was_measured(
    monkeypatch: pytest.MonkeyPatch, model_dir: Path, tmp_path: Path, wins: bool
) -> None:
    measured(monkeypatch, 2.0 if wins else 0.5, 2.0)
    found: LoadedModel = load(pruned(model_dir, tmp_path), "cpu")
    body = [row for row in found.layers if "proj" in row.name]
    assert {row.storage for row in body} == {"int8 sparse" if wins else "int8"}
    assert {row.execution for row in body} == {"int8 x int8"}
    assert len(found.sparse) == 4
    for linear in found.linears:
        check_linear(linear)
    assert load(tmp_path, "torch").sparse == ()
