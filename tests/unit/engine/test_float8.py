"""FP8: the grid itself, the format, and the arithmetic against plain float64."""

import math

import pytest
import torch
from torch import Tensor

from engine.errors import ModelLoadError
from engine.formats.float_quantized import (
    DTYPE,
    LARGEST,
    Float8Weight,
    config_group,
    pack,
    to_float8,
    unpack,
)
from engine.formats.quant_config import checkpoint_format
from engine.kernels import kernel
from engine.kernels.reference import float8_activations, float8_linear
from engine.layers.float8 import Float8Linear
from engine.layers.linear import Split, make_fused, make_linear
from engine.layers.weight import quantize_int8, take_rows
from engine.self_test import check_linear

CODES = torch.arange(256, dtype=torch.uint8).view(DTYPE)
# (M, N, K)
SHAPES = [(1, 1, 1), (2, 5, 64), (7, 33, 96), (13, 1500, 40), (3, 8, 172)]


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def by_the_book(code: int) -> float:
    """The value of a byte, from its sign, exponent and mantissa."""
    sign, exponent, mantissa = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def nearest(value: float) -> float:
    """Of all values; of two equally near the one with the even mantissa."""
    positive = [by_the_book(code) for code in range(127)]
    best = min(range(127), key=lambda code: (abs(positive[code] - abs(value)), code & 1))
    return math.copysign(positive[best], value)


def test_all_bytes_have_their_values_and_keep_them() -> None:
    values = CODES.float()
    book = torch.tensor([by_the_book(code) for code in range(256)])
    assert torch.equal(values.nan_to_num(nan=1e9), book.nan_to_num(nan=1e9))
    number = ~book.isnan()
    assert same(to_float8(values)[number], CODES[number])
    assert float(book[number].max()) == LARGEST


def test_rounding_is_to_nearest_and_ties_go_to_even() -> None:
    book = torch.tensor([by_the_book(code) for code in range(127)], dtype=torch.float64)
    halves = (book[1:] + book[:-1]) / 2
    near = torch.cat([halves, halves * (1 + 1e-6), halves * (1 - 1e-6), book])
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(300, generator=generator).double() * torch.logspace(-4, 3, 300).double()
    values = torch.cat([near, -near, wide]).float()
    wanted = torch.tensor([nearest(value) for value in values.tolist()])
    assert torch.equal(to_float8(values).float(), wanted)


def test_what_is_too_large_becomes_the_largest_and_nan_stays() -> None:
    values = torch.tensor([449.0, 464.0, 480.0, 1e30, math.inf, -465.0, -math.inf, math.nan, 1e-9])
    found = to_float8(values).float()
    assert found[:5].tolist() == [448.0] * 5
    assert found[5:7].tolist() == [-448.0] * 2
    assert found[7].isnan()
    assert found[8] == 0


def weight(outs: int, columns: int, dtype: torch.dtype = torch.float32) -> Float8Weight:
    generator = torch.Generator().manual_seed(outs + columns)
    q_NK = to_float8(torch.randn(outs, columns, generator=generator) * 100)
    return Float8Weight(q_NK, (torch.rand(outs, generator=generator) + 0.01).to(dtype))


def inputs(rows: int, columns: int) -> Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
    x[0] *= 1e4
    return x


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unpack_is_the_inverse_of_pack(dtype: torch.dtype, transposed: bool) -> None:
    before = weight(5, 7, dtype)
    tensors = pack(before, transposed=transposed)
    assert tensors["weight"].shape == ((7, 5) if transposed else (5, 7))
    assert tensors["weight_scale"].shape == ((1, 5) if transposed else (5, 1))
    after = unpack(tensors, transposed=transposed)
    assert same(after.q_NK.contiguous(), before.q_NK)
    assert torch.equal(after.scale_N, before.scale_N)
    assert torch.equal(after.dequantize(), before.dequantize())


@pytest.mark.parametrize(
    "change",
    [
        {"weight": torch.zeros(5, 7)},
        {"weight": torch.zeros(5, 7, dtype=torch.float8_e5m2)},
        {"weight": torch.zeros(35).to(DTYPE)},
        {"weight": torch.full((5, 7), math.nan).to(DTYPE)},
        {"weight_zero_point": torch.ones(5, 1).to(DTYPE)},
        {"weight_scale": torch.ones(5)},
        {"weight_scale": torch.ones(1)},
        {"weight_scale": torch.ones(1, 5)},
        {"weight_scale": torch.ones(5, 1, dtype=torch.int32)},
    ],
)
def test_tensors_that_are_refused(change: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="weight"):
        unpack(pack(weight(5, 7)) | change)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_row_of_activations_uses_the_whole_range(shape: tuple[int, int, int]) -> None:
    rows, _, columns = shape
    x = inputs(rows, columns)
    q, scale = float8_activations(x)
    assert q.float().abs().amax(1).tolist() == [448.0] * rows
    error = (q.float() * scale[:, None] - x).abs()
    assert bool((error <= torch.maximum(x.abs() * 2**-4, scale[:, None] * 2**-10) * 1.001).all())


def test_rows_of_extreme_values() -> None:
    tiny = torch.finfo(torch.float32).tiny
    x = torch.tensor([[0.0, 0.0], [1e-45, 0.0], [tiny, -tiny], [3e38, 1.0], [1.0, math.nan]])
    q, scale = float8_activations(x)
    assert torch.isfinite(scale[:4]).all()
    assert (scale > 0)[:4].all()
    assert torch.isfinite(q.float()[:4]).all()
    assert q.float()[0].tolist() == [0.0, 0.0]
    assert q.float()[3].tolist() == [448.0, 0.0]
    out = float8_linear(x, Float8Weight(to_float8(torch.ones(1, 2)), torch.ones(1)))
    assert out[0].item() == 0
    assert torch.allclose(out[3], torch.tensor([3e38]))
    assert out[4].isnan()
    infinite = float8_linear(
        torch.tensor([[math.inf, 1.0]]), Float8Weight(to_float8(torch.ones(1, 2)), torch.ones(1))
    )
    assert not infinite.isfinite().any(), "an overflow must be seen"


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_is_that_of_the_rounded_values(
    shape: tuple[int, int, int], backend: str
) -> None:
    rows, outs, columns = shape
    w, x = weight(outs, columns), inputs(rows, columns)
    found = kernel("float8_linear", backend)(x, w)
    q, scale = float8_activations(x)
    sums = (q.double()[:, None] * w.q_NK.double()).sum(2)
    assert torch.equal(found, sums.float() * (scale[:, None] * w.scale_N))
    unrounded = x @ w.dequantize().t()
    assert rows == 1 or not torch.allclose(found, unrounded, rtol=1e-4), "activations are rounded"
    for row in range(rows):
        assert torch.equal(kernel("float8_linear", backend)(x[row : row + 1], w)[0], found[row])


def test_layers() -> None:
    parts, bias_N, x = [weight(8, 64), weight(4, 64)], torch.randn(12), inputs(3, 64)
    fused = make_fused(parts, "torch", bias_N)
    assert isinstance(fused, Float8Linear)
    assert (fused.storage, fused.execution) == ("float8_e4m3", "float8_e4m3 x float8_e4m3")
    assert fused.nbytes == 12 * 64 + 4 * 12 + 4 * 12
    check_linear(fused)
    one_by_one = torch.cat([float8_linear(x, part) for part in parts], 1) + bias_N
    assert torch.equal(fused(x), one_by_one)
    mixed = make_fused([parts[0], quantize_int8(parts[1].dequantize())], "torch")
    assert isinstance(mixed, Split)
    check_linear(mixed)
    rows = take_rows(parts[0], torch.tensor([3, 1]))
    assert torch.equal(make_linear(rows, "cpu")(x), float8_linear(x, parts[0])[:, [3, 1]])


GROUP = config_group(["Linear"])


def quantization(part: str = "weights", **change: object) -> dict[str, object]:
    values = GROUP[part]
    assert isinstance(values, dict)
    group = {**GROUP, part: {**values, **change}}
    method = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    return {"quantization_config": {**method, "config_groups": {"group_0": group}}}


def test_our_own_configuration_is_served() -> None:
    assert checkpoint_format(quantization()) == "compressed-tensors/float-quantized"


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("weights", {"strategy": "tensor"}, "weights.strategy is 'tensor'"),
        ("weights", {"strategy": "block", "block_structure": [128, 128]}, "'block'"),
        ("weights", {"num_bits": 4}, "num_bits is 4"),
        ("weights", {"type": "int"}, "type is 'int'"),
        ("input_activations", {"dynamic": False}, "input_activations.dynamic is False"),
        ("input_activations", {"strategy": "tensor"}, "input_activations.strategy is 'tensor'"),
        ("input_activations", {"strategy": "group", "group_size": 128}, "'group'"),
        ("input_activations", {"type": "int"}, "input_activations.type is 'int'"),
    ],
)
def test_other_arithmetic_is_refused_by_name(
    part: str, change: dict[str, object], named: str
) -> None:
    with pytest.raises(ModelLoadError) as caught:
        checkpoint_format(quantization(part, **change))
    assert named in str(caught.value)
    assert "--recipe" in str(caught.value)
