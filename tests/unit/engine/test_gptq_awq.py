"""GPTQ's and AWQ's tensors against their definitions, and what is refused."""

from typing import Any

import pytest
import torch
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from torch import Tensor

from engine.errors import ModelLoadError
from engine.formats import awq, gptq, pack_quantized
from engine.formats.grouped import GroupedWeight, by_group
from engine.formats.quant_config import packed_scheme
from engine.layers.linear import Reordered, Split, make_fused, make_linear
from engine.layers.weight import WeightOnly, take_rows
from engine.self_test import check_linear

# Out-features, in-features, group size (None: one group); the last group may be shorter.
SHAPES = [(8, 32, None), (16, 64, 32), (8, 72, 32), (32, 96, 8), (24, 64, 128)]


def random_weight(
    outs: int, columns: int, group: int | None, *, bits: int = 4, zeros: bool = True, least: int = 0
) -> GroupedWeight:
    """``least`` is the smallest zero point, as it is without a sign."""
    generator = torch.Generator().manual_seed(outs + columns + bits)
    half, size = 1 << (bits - 1), group or columns
    shape = (outs, -(-columns // size))

    def integers(low: int, *shape: int) -> Tensor:
        return torch.randint(low, half, shape, generator=generator).to(torch.int8)

    zero_NG = integers(least - half, *shape) if zeros else None
    scale_NG = (torch.rand(shape, generator=generator) + 0.1).half()
    return GroupedWeight(integers(-half, outs, columns), scale_NG, zero_NG, size, bits)


def order_of(weight: GroupedWeight) -> Tensor:
    """Columns in the order of the groups that a random ``g_idx`` gives."""
    columns = weight.q_NK.shape[1]
    shuffled = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    order_K = by_group((torch.arange(columns) // weight.group)[shuffled], weight.group)
    return torch.arange(columns) if order_K is None else order_K


def field(words: Tensor, row: int, column: int, bits: int, *, along_rows: bool) -> int:
    """An unsigned integer of a packed matrix, by its place in the unpacked one."""
    each, at = 32 // bits, row if along_rows else column
    word = words[row // each, column] if along_rows else words[row, column // each]
    return int(word) >> (bits * (at % each)) & ((1 << bits) - 1)


def defined(tensors: dict[str, Tensor], bits: int, version: int) -> Tensor:
    """The weight [N, K] by GPTQ's definition, element by element."""
    scales, g_idx = tensors["scales"], tensors["g_idx"].tolist()
    weight_NK = torch.empty(scales.shape[1], len(g_idx))
    for n in range(scales.shape[1]):
        for k, group in enumerate(g_idx):
            u = field(tensors["qweight"], k, n, bits, along_rows=True)
            zero = field(tensors["qzeros"], group, n, bits, along_rows=False)
            zero = (zero + (version == 1)) % (1 << bits)
            weight_NK[n, k] = (u - zero) * float(scales[group, n])
    return weight_NK


def in_place(weight: GroupedWeight, order_K: Tensor | None) -> Tensor:
    """Dequantised, columns as the layer has them."""
    dense_NK = weight.dequantize()
    return dense_NK if order_K is None else dense_NK[:, order_K.argsort()]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("by_activation", [True, False])
@pytest.mark.parametrize(("outs", "columns", "group"), SHAPES)
def test_gptq_is_as_defined_and_survives(
    outs: int, columns: int, group: int | None, by_activation: bool, zeros: bool, bits: int,
    version: int,
) -> None:  # fmt: skip
    before = random_weight(outs, columns, group, bits=bits, zeros=zeros, least=version == 1)
    order_K = order_of(before) if by_activation else None
    tensors = gptq.pack(before, order_K, version=version)
    assert tensors["qweight"].shape == (columns * bits // 32, outs)
    assert torch.equal(defined(tensors, bits, version), in_place(before, order_K))
    after, again_K = gptq.unpack(tensors, columns, group, version=version)
    if by_activation and group is not None and group < columns:
        assert again_K is not None
    assert torch.equal(in_place(after, again_K), in_place(before, order_K))
    assert (after.bits, after.group, after.zero_NG is None) == (bits, before.group, not zeros)
    once_more = gptq.pack(after, again_K, version=version)
    assert all(torch.equal(once_more[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_zero_point_of_0_wraps_around_in_v1(bits: int) -> None:
    half = 1 << (bits - 1)
    weight = random_weight(8, 32, None, bits=bits, least=1)
    assert weight.zero_NG is not None
    tensors = gptq.pack(weight, version=1)
    weight.zero_NG[3] = -half
    with pytest.raises(ValueError, match="write gptq_v2"):
        gptq.pack(weight, version=1)
    stored = pack_quantized.unpack_rows(tensors["qzeros"], bits, 8)
    stored[0, 3] = half - 1  # all bits are 1: 0 - 1 of as many bits
    tensors["qzeros"] = pack_quantized.pack_rows(stored, bits)
    found, _ = gptq.unpack(tensors, 32, None, version=1)
    assert torch.equal(found.dequantize(), weight.dequantize())


def test_symmetric_zero_points_are_the_well_known_words() -> None:
    weight = random_weight(8, 32, None, zeros=False)
    words = {version: gptq.pack(weight, version=version)["qzeros"] for version in (1, 2)}
    assert [int(words[v][0, 0]) & 0xFFFFFFFF for v in (1, 2)] == [0x77777777, 0x88888888]


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize(("outs", "columns", "group"), [(8, 32, None), (16, 64, 32), (32, 96, 8)])
def test_awq_is_the_packages_and_survives(
    outs: int, columns: int, group: int | None, zeros: bool
) -> None:
    before = random_weight(outs, columns, group, zeros=zeros)
    tensors = awq.pack(before)
    assert tensors["qweight"].shape == (columns, outs // 8)
    after = awq.unpack(tensors)
    assert torch.equal(after.dequantize(), before.dequantize())
    assert (after.zero_NG is None) == (not zeros)
    assert all(torch.equal(awq.pack(after)[name], tensor) for name, tensor in tensors.items())
    converter = AutoAWQConverter(group_size=before.group)
    converted = converter.process({f"m.{name}": tensor for name, tensor in tensors.items()})
    theirs = pack_quantized.unpack({name[2:]: tensor for name, tensor in converted.items()})
    assert torch.equal(theirs.dequantize(), before.dequantize())


def good(group: int = 32) -> dict[str, Tensor]:
    return gptq.pack(random_weight(16, 64, group))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": torch.zeros(7, 16, dtype=torch.int32)}, "not of 4 or 8 bits"),
        ({"qweight": torch.zeros(4, 16, dtype=torch.int32)}, "not of 4 or 8 bits"),
        ({"qweight": torch.zeros(8, 16)}, "qweight is torch.float32"),
        ({"qweight": torch.zeros(16, 16, dtype=torch.int32)}, "qzeros is"),
        ({"scales": torch.ones(2, 15)}, "scales must be"),
        ({"scales": torch.ones(16)}, "scales must be"),
        ({"scales": torch.ones(2, 16, dtype=torch.int32)}, "scales must be"),
        ({"scales": torch.ones(3, 16)}, "qzeros is"),
        ({"scales": torch.ones(0, 16), "qzeros": torch.zeros(0, 2, dtype=torch.int32)}, "0 groups"),
        ({"qzeros": torch.zeros(2, 3, dtype=torch.int32)}, "qzeros is"),
        ({"g_idx": torch.arange(64) // 16}, "g_idx does not divide"),
        ({"g_idx": torch.zeros(64, dtype=torch.int32)}, "g_idx does not divide"),
        ({"g_idx": -torch.ones(64, dtype=torch.int32)}, "g_idx does not divide"),
        ({"g_idx": torch.zeros(63, dtype=torch.int32)}, "g_idx is"),
        ({"g_idx": torch.zeros(64)}, "g_idx is"),
    ],
)
def test_gptq_tensors_that_are_refused(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gptq.unpack(good() | change, 64, 32, version=2)


def test_tensors_that_are_not_what_the_configuration_says() -> None:
    scheme = gptq.GptqScheme(bits=4, group_size=32, symmetric=True, version=2)
    with pytest.raises(ValueError, match="sym is true, but zero points"):
        scheme.unpack(good(), 64)
    symmetric = random_weight(16, 64, 32, zeros=False)
    with pytest.raises(ValueError, match="not of checkpoint_format gptq_v2"):
        scheme.unpack(gptq.pack(symmetric, version=1), 64)
    assert torch.equal(scheme.unpack(gptq.pack(symmetric), 64)[0].q_NK, symmetric.q_NK)
    with pytest.raises(ValueError, match="2 groups, group_size 64 needs 1"):
        gptq.unpack(good(), 64, 64, version=2)
    eight = random_weight(16, 64, 32, bits=8, zeros=False)
    with pytest.raises(ValueError, match="qweight has 8 bits, the configuration 4"):
        scheme.unpack(gptq.pack(eight), 64)
    packed = awq.pack(random_weight(16, 64, 32))
    with pytest.raises(ValueError, match="2 groups, group_size None needs 1"):
        awq.AwqScheme(None).unpack(packed, 64)
    with pytest.raises(ValueError, match="64 rows, not 32"):
        awq.AwqScheme(32).unpack(packed, 32)


@pytest.mark.parametrize(
    "change",
    [
        {"qweight": torch.zeros(64, 2)},
        {"qweight": torch.zeros(64, 3, dtype=torch.int32)},
        {"scales": torch.ones(2, 15)},
        {"scales": torch.ones(3, 16)},
        {"scales": torch.ones(2, 16, dtype=torch.int32)},
        {"qzeros": torch.zeros(2, 3, dtype=torch.int32)},
        {"qzeros": torch.zeros(2, 2)},
    ],
)
def test_awq_tensors_that_are_refused(change: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"must be|groups|qzeros"):
        awq.unpack(awq.pack(random_weight(16, 64, 32)) | change)


GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}


@pytest.mark.parametrize(
    ("change", "scheme"),
    [
        ({}, gptq.GptqScheme(4, 128, symmetric=False, version=1)),
        ({"sym": True, "bits": 8}, gptq.GptqScheme(8, 128, symmetric=True, version=1)),
        ({"group_size": -1}, gptq.GptqScheme(4, None, symmetric=False, version=1)),
        ({"checkpoint_format": "gptq"}, gptq.GptqScheme(4, 128, symmetric=False, version=1)),
        ({"checkpoint_format": "gptq_v2"}, gptq.GptqScheme(4, 128, symmetric=False, version=2)),
        ({"dynamic": {"-:.*down.*": {}}}, gptq.GptqScheme(4, 128, symmetric=False, version=1)),
    ],
)
def test_gptq_configurations(change: dict[str, Any], scheme: gptq.GptqScheme) -> None:
    assert packed_scheme({"quantization_config": GPTQ | change}) == scheme


@pytest.mark.parametrize(
    "change", [{}, {"version": "GEMM"}, {"zero_point": True}, {"modules_to_not_convert": ["x"]}]
)
def test_awq_configurations(change: dict[str, Any]) -> None:
    assert packed_scheme({"quantization_config": AWQ | change}) == awq.AwqScheme(128)
    own = {"quant_method": "awq", "w_bit": 4, "q_group_size": -1, "version": "GEMM"}
    assert packed_scheme({"quantization_config": own}) == awq.AwqScheme(None)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        *[(GPTQ | {"bits": bits}, f"{bits} bits") for bits in (2, 3, 5, 6, 7, None)],
        *[
            (GPTQ | {"checkpoint_format": kind}, kind)
            for kind in ("marlin", "bitblas", "gemm", "gptq_v3")
        ],
        (GPTQ | {"format": "marlin"}, "marlin"),
        (GPTQ | {"is_marlin_format": True}, "marlin"),
        (GPTQ | {"pack_dtype": "int8"}, "int8"),
        (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic"),
        (GPTQ | {"dynamic": {".*down.*": {"bits": 8}}}, "dynamic"),
        (GPTQ | {"lm_head": True}, "lm_head"),
        (GPTQ | {"adapter": {"type": "lora"}}, "adapter"),
        (GPTQ | {"rotation": "hadamard"}, "rotation"),
        *[(one | {"group_size": size}, "group_size") for one in (GPTQ, AWQ)
          for size in (0, -2, "128", None, True)],
        *[(AWQ | {"version": kind}, kind) for kind in ("gemv", "gemv_fast", "marlin")],
        *[(AWQ | {"bits": bits}, f"{bits} bits") for bits in (3, 8, None)],
        (AWQ | {"zero_point": False}, "zero_point"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_named(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelLoadError, match=named) as caught:
        packed_scheme({"quantization_config": config})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("outs", "columns", "group"), SHAPES)
def test_layers_compute_what_the_weight_says(
    outs: int, columns: int, group: int | None, bits: int, backend: str
) -> None:
    weight = random_weight(outs, columns, group, bits=bits)
    order_K = order_of(weight)
    layer = make_linear(WeightOnly(weight, order_K), backend, torch.randn(outs))
    check_linear(layer)
    assert isinstance(layer, Reordered)
    native = backend == "cpu" and (group is None or group % 32 == 0)
    assert layer.storage == f"int{bits}" + ("" if native else " unpacked to float32")
    assert layer.execution == (f"int{bits} x float32" if native else "float32 x float32")
    x_MK = torch.randn(5, columns, generator=torch.Generator().manual_seed(1))
    wanted = x_MK.double() @ in_place(weight, order_K).double().t()
    layer = make_linear(WeightOnly(weight, order_K), backend)
    assert torch.allclose(layer(x_MK).double(), wanted, rtol=1e-4, atol=1e-4)


def test_layers_are_fused_where_their_orders_are_equal() -> None:
    first, second = random_weight(16, 64, 32), random_weight(8, 64, 32)
    order_K, x_MK = order_of(first), torch.randn(3, 64)
    parts = [WeightOnly(first, order_K), WeightOnly(second, order_K.clone())]
    fused = make_fused(parts, "cpu")
    assert isinstance(fused, Reordered)
    split = make_fused([parts[0], WeightOnly(second)], "cpu")
    assert isinstance(split, Split)
    rows = take_rows(parts[0], torch.tensor([3, 1]))
    wanted_MN = make_linear(parts[0], "cpu")(x_MK)
    assert torch.equal(fused(x_MK)[:, :16], wanted_MN)
    assert torch.equal(split(x_MK)[:, :16], wanted_MN)
    assert torch.equal(make_linear(rows, "cpu")(x_MK), wanted_MN[:, [3, 1]])
