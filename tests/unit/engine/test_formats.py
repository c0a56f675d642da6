"""Formats: pack and unpack, the configurations that are served, the runtime's wishes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import ModelLoadError
from engine.formats import int_quantized
from engine.formats.int_quantized import Int8Weight, config_group, pack, unpack
from engine.formats.quant_config import checkpoint_format
from engine.formats.runtime import MANIFEST_NAME, Runtime, read_runtime, to_json
from engine.layers.weight import quantize_int8


def weight(rows: int = 3, columns: int = 5, dtype: torch.dtype = torch.float32) -> Int8Weight:
    generator = torch.Generator().manual_seed(rows)
    q = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    return Int8Weight(q, torch.rand(rows, generator=generator).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 7)])
def test_unpack_is_the_inverse_of_pack(shape: tuple[int, int], dtype: torch.dtype) -> None:
    before = weight(*shape, dtype)
    tensors = pack(before)
    assert tensors["weight"].shape == shape
    assert tensors["weight_scale"].shape == (shape[0], 1)
    after = unpack(tensors)
    assert torch.equal(after.q_NK, before.q_NK)
    assert torch.equal(after.scale_N, before.scale_N)
    assert after.scale_N.dtype == dtype


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 7)])
def test_a_transposed_layer_keeps_its_own_layout(shape: tuple[int, int]) -> None:
    before = weight(*shape)
    tensors = pack(before, transposed=True)
    assert tensors["weight"].shape == shape[::-1]
    assert torch.equal(tensors["weight"] * tensors["weight_scale"], before.dequantize().t())
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    after = unpack(tensors, transposed=True)
    assert torch.equal(after.q_NK, before.q_NK)
    assert torch.equal(after.scale_N, before.scale_N)
    if shape != (1, 1):
        with pytest.raises(ValueError, match="must be"):
            unpack(tensors)


def test_pack_leaves_its_input_alone_and_is_contiguous() -> None:
    q = torch.arange(6, dtype=torch.int8).view(2, 3).t()
    before = Int8Weight(q, torch.ones(3))
    packed = pack(before)
    assert packed["weight"].is_contiguous()
    assert before.q_NK is q
    assert torch.equal(packed["weight"], q)


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": torch.zeros(3, 5)},
        {"weight": torch.zeros(3, 5, dtype=torch.uint8)},
        {"weight": torch.zeros(15, dtype=torch.int8)},
        {"weight_scale": torch.zeros(3)},
        {"weight_scale": torch.zeros(1, 3)},
        {"weight_scale": torch.zeros(5, 1)},
        {"weight_scale": torch.zeros(3, 1, dtype=torch.int32)},
    ],
)
def test_other_dtypes_and_shapes_are_refused(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="must be"):
        unpack({**pack(weight()), **tensors})


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (64, 128), (5, 300_000)])
def test_a_quantised_weight_is_within_half_a_step(shape: tuple[int, int]) -> None:
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3
    found = quantize_int8(dense)
    half = found.scale_N[:, None] / 2
    assert bool(((found.dequantize() - dense).abs() <= half * (1 + 1e-3)).all())


def test_a_quantised_row_uses_the_whole_range() -> None:
    dense = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    q = quantize_int8(dense).q_NK
    largest = torch.maximum(q.amax(1) == 127, q.amin(1) <= -127)
    assert bool(largest.all())


def test_a_zero_row_quantises_to_zero() -> None:
    dense = torch.zeros(2, 4)
    dense[0, 1] = 5.0
    found = quantize_int8(dense)
    assert torch.equal(found.dequantize()[1], torch.zeros(4))
    assert bool(torch.isfinite(found.scale_N).all())


GROUP: Any = config_group(["Linear"])
SERVED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": int_quantized.FORMAT,
    "config_groups": {"group_0": GROUP},
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
}


def group(part: str, **values: object) -> dict[str, Any]:
    return {"config_groups": {"group_0": {**GROUP, part: {**GROUP[part], **values}}}}


def test_a_dense_checkpoint_is_safetensors() -> None:
    assert checkpoint_format({}) == "safetensors"
    assert checkpoint_format({"quantization_config": None}) == "safetensors"


def test_our_own_group_is_served() -> None:
    found = checkpoint_format({"quantization_config": SERVED})
    assert found == "compressed-tensors/int-quantized"


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "bitsandbytes"},
        {"quant_method": "fp8"},
        {"quant_method": None},
        {"format": "float-quantized"},
        {"format": None},
        {"kv_cache_scheme": {"num_bits": 8}},
        group("weights", num_bits=4),
        group("weights", num_bits=3, strategy="group"),
        group("weights", num_bits=4, strategy="group", symmetric=False),
        group("weights", type="float"),
        group("weights", strategy="group"),
        group("weights", symmetric=False),
        group("input_activations", num_bits=4),
        group("input_activations", type="float"),
        group("input_activations", strategy="tensor"),
        group("input_activations", dynamic=False),
        group("input_activations", symmetric=False),
        {"config_groups": {"group_0": {**GROUP, "weights": None}}},
        {"config_groups": {"group_0": {**GROUP, "input_activations": None}}},
        {"config_groups": {"group_0": {**GROUP, "output_activations": GROUP["weights"]}}},
        {"config_groups": {"good": GROUP, **group("weights", num_bits=4)["config_groups"]}},
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        {"sparsity_config": "2:4"},
        {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}},
    ],
)
def test_what_the_engine_has_no_arithmetic_for_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ModelLoadError):
        checkpoint_format({"quantization_config": {**SERVED, **change}})


@pytest.mark.parametrize(
    "quantization",
    [
        "int8",
        [],
        ["x"],
        7,
        {},
        {**SERVED, "config_groups": [GROUP]},
        {**SERVED, "config_groups": {"group_0": None}},
        {**SERVED, "config_groups": {"group_0": {**GROUP, "weights": "int8"}}},
    ],
)
def test_a_configuration_of_a_wrong_shape_is_refused(quantization: Any) -> None:
    with pytest.raises(ModelLoadError):
        checkpoint_format({"quantization_config": quantization})


@pytest.mark.parametrize("head", ["int8", "keep"])
@pytest.mark.parametrize("kv_dtype", ["int8", "fp32"])
def test_the_runtime_survives_its_manifest(tmp_path: Path, head: str, kv_dtype: str) -> None:
    runtime = Runtime(head=head, kv_dtype=kv_dtype)
    manifest = {"runtime": to_json(runtime), "something": "else"}
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert read_runtime(tmp_path) == runtime


@pytest.mark.parametrize("manifest", [None, {}, {"runtime": {}}])
def test_a_folder_without_wishes_has_the_defaults(tmp_path: Path, manifest: Any) -> None:
    if manifest is not None:
        (tmp_path / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert read_runtime(tmp_path) == Runtime()


@pytest.mark.parametrize(
    "manifest",
    [
        {"runtime": {"head": "int4"}},
        {"runtime": {"head": None}},
        {"runtime": {"kv_dtype": "fp8"}},
        {"runtime": {"kv_dtype": ["int8"]}},
        {"runtime": {"sparsity": "2:4"}},
        {"runtime": "int8"},
        {"runtime": [1]},
        {"runtime": None},
        [],
    ],
)
def test_wishes_that_this_version_does_not_know_are_refused(tmp_path: Path, manifest: Any) -> None:
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(ModelLoadError, match=r"venturi\.json"):
        read_runtime(tmp_path)
