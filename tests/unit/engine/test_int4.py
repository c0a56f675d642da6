"""4-bit layers: the kernel against its reference and against float64, fused and split."""

import math

import pytest
import torch
from torch import Tensor

from engine.formats.grouped import GroupedWeight
from engine.formats.int_quantized import Int8Weight
from engine.kernels import kernel, reference
from engine.kernels.reference import fma, int4_linear, quantize_activations
from engine.layers.linear import Split, make_fused, make_linear
from engine.layers.weight import WeightOnly, take_rows
from engine.self_test import check_linear

SHAPES = [(1, 1, 1, 1), (2, 5, 64, 2), (7, 33, 96, 3), (1, 40, 704, 22), (17, 8, 172, 1)]


def random_weight(rows: int, columns: int, groups: int, *, zeros: bool = False) -> GroupedWeight:
    generator = torch.Generator().manual_seed(rows + columns)
    q_NK = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    zero_NG = torch.randint(-8, 8, (rows, groups), generator=generator, dtype=torch.int8)
    scale_NG = torch.rand(rows, groups, generator=generator) + 0.01
    return GroupedWeight(q_NK, scale_NG, zero_NG if zeros else None)


def inputs(rows: int, columns: int) -> Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
    x[0] *= 1e4
    return x


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_bit_equal(shape: tuple[int, int, int, int], zeros: bool) -> None:
    rows, out, columns, groups = shape
    weight = random_weight(out, columns, groups, zeros=zeros)
    x = inputs(rows, columns)
    if rows > 2:
        x[1] = 0
    wanted = int4_linear(x, weight)
    assert torch.equal(kernel("int4_linear", "torch")(x, weight), wanted)
    q_MK, scale_M = quantize_activations(x)
    exact = (q_MK.double() @ weight.dequantize().double().t()) * scale_M[:, None].double()
    assert torch.allclose(wanted.double(), exact, rtol=1e-5, atol=1e-4 * float(exact.abs().max()))
    if rows > 2:
        assert not wanted[1].any()


def test_a_row_does_not_depend_on_the_others() -> None:
    weight, x = random_weight(12, 64, 2), inputs(9, 64)
    run = kernel("int4_linear", "torch")
    whole = run(x, weight)
    for row in range(9):
        alone = run(x[row : row + 1], weight)
        assert torch.equal(alone[0], whole[row])


@pytest.mark.skipif(not hasattr(math, "fma"), reason="math.fma is new in Python 3.13")
def test_fma_is_the_languages() -> None:
    check_fma(math.fma)  # type: ignore[attr-defined]


def test_fma_rounds_once() -> None:
    # In float64 the sum lies half-way between two floats; the lost bit decides.
    a, b, c = 1 + 2.0**-23, 1 + 2.0**-23, 2.0**-55
    found = fma(torch.tensor([a, -a]), torch.tensor([b, b]), torch.tensor([c, -c]))
    assert found.tolist() == [1 + 2.0**-22, -(1 + 2.0**-22)]
    big, tiny = torch.tensor([1.0 + 2.0**-23]), torch.tensor([2.0**-25])
    half = fma(big, torch.tensor([1.0]), torch.tensor([2.0**-24]))
    assert half.item() == 1 + 2.0**-22  # a tie goes to the even mantissa
    assert fma(big, torch.tensor([1.0]), tiny).item() == 1 + 2.0**-23
    assert fma(torch.zeros(1), torch.ones(1), torch.zeros(1)).item() == 0


def check_fma(oracle: object) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(500, generator=generator) for _ in range(3))
    assert callable(oracle)
    expected = [oracle(*three) for three in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
    assert torch.equal(fma(a, b, c), torch.tensor(expected, dtype=torch.float64).float())


def test_weights_of_one_kind_are_fused() -> None:
    weights = [random_weight(rows, 64, 2, zeros=True) for rows in (8, 4, 4)]
    x, bias_N = inputs(3, 64), torch.randn(16)
    fused = make_fused(weights, "torch", bias_N)
    assert (fused.storage, fused.execution) == ("int4", "int4 x int8")
    parts = [make_linear(weight, "torch")(x) for weight in weights]
    assert torch.equal(fused(x), torch.cat(parts, 1) + bias_N)
    check_linear(fused)


def test_other_kinds_are_run_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    int8 = Int8Weight(
        torch.randint(-8, 8, (4, 64), dtype=torch.int8, generator=generator), torch.ones(4)
    )
    weights = [random_weight(8, 64, 2), random_weight(8, 64, 4), int8, torch.ones(2, 64)]
    fused = make_fused(weights, "torch", torch.arange(22.0))
    assert isinstance(fused, Split)
    assert [part.storage for part in fused.parts] == ["int4", "int4", "int8", "float32"]
    assert fused(inputs(2, 64)).shape == (2, 22)
    check_linear(fused)


def test_unpacked_weights_say_so() -> None:
    weights = [random_weight(rows, 64, 2) for rows in (8, 4)]
    fused = make_fused([WeightOnly(one) for one in weights], "torch")
    assert fused.storage == "int4 unpacked to float32"
    assert fused.execution == "float32 x float32"
    x = inputs(2, 64)
    dense = torch.cat([one.dequantize() for one in weights])
    assert torch.equal(fused(x), reference.dense_linear(x, dense))
    check_linear(fused)


def test_take_rows() -> None:
    order_N, weight = torch.tensor([2, 0]), random_weight(4, 64, 2, zeros=True)
    for one in (weight, WeightOnly(weight), weight.dequantize()):
        found = take_rows(one, order_N)
        dense = found if isinstance(found, Tensor) else None
        if isinstance(found, GroupedWeight):
            dense = found.dequantize()
        elif isinstance(found, WeightOnly):
            dense = found.weight.dequantize()
        assert dense is not None
        assert torch.equal(dense, weight.dequantize()[order_N])
