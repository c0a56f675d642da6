"""Native linear layers on every instruction set: bit-equal to the reference, whatever M."""

import pytest
import torch
from torch import Tensor

from engine.formats.int_quantized import Int8Weight
from engine.kernels import reference
from engine.kernels.cpu.library import kernels, supported
from engine.kernels.cpu.linear import PackedInt8Linear

ROWS = (1, 2, 5, 8, 13, 33, 64, 65, 200)
SHAPES = [(1, 1), (31, 3), (33, 65), (32, 64), (64, 100), (200, 300)]
sets = pytest.mark.parametrize("name", supported())


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int8_weight(N: int, K: int, seed: int = 0) -> Int8Weight:
    generator = torch.Generator().manual_seed(seed)
    q_NK = torch.randint(-128, 128, (N, K), generator=generator, dtype=torch.int8)
    return Int8Weight(q_NK, torch.rand(N, generator=generator))


def packed(weight: Int8Weight, name: str, bias_N: Tensor | None = None) -> PackedInt8Linear:
    return PackedInt8Linear.pack(weight, bias_N, kernels(name))


@sets
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.usefixtures("threads")
def test_int8_is_bit_equal_for_all_rows(name: str, N: int, K: int, biased: bool) -> None:
    weight, bias_N = int8_weight(N, K), randn(N, seed=9) if biased else None
    linear = packed(weight, name, bias_N)
    for M in ROWS:
        x_MK = randn(M, K, seed=M)
        wanted = reference.int8_linear(x_MK, weight.q_NK, weight.scale_N)
        assert torch.equal(linear(x_MK), wanted if bias_N is None else wanted + bias_N), M


@sets
@pytest.mark.usefixtures("threads")
def test_int8_of_a_large_layer_is_bit_equal(name: str) -> None:
    """Large enough for several threads, blocks of panels and more than one tile each."""
    weight = int8_weight(1056, 1040)
    linear = packed(weight, name)
    for M in (1, 12, 50):
        x_MK = randn(M, 1040, seed=M)
        wanted = reference.int8_linear(x_MK, weight.q_NK, weight.scale_N)
        assert torch.equal(linear(x_MK), wanted), M


def adversarial_rows(K: int) -> Tensor:
    x_MK = randn(8, K)
    x_MK[0] = 0.0
    x_MK[1] *= 1e-30
    x_MK[2, K // 2] = 1e4
    x_MK[3] = 0.5  # 0.5 * (127 / 0.5) is exact, and so is every tie that follows
    x_MK[4] = torch.arange(K) / 2 / 127
    x_MK[5] = 1e38
    x_MK[6] = -1.0
    return x_MK


@sets
def test_int8_is_bit_equal_on_extreme_values(name: str) -> None:
    weight = int8_weight(40, 70)
    weight.q_NK[4], weight.q_NK[5], weight.scale_N[6] = -128, 127, 0.0
    x_MK = adversarial_rows(70)
    found = packed(weight, name)(x_MK)
    assert torch.equal(found, reference.int8_linear(x_MK, weight.q_NK, weight.scale_N))
    assert not bool(found[0].any())


@sets
@pytest.mark.parametrize("fill", [-128, 127])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_int8_does_not_saturate(name: str, fill: int, sign: float) -> None:
    for K in (64, 1000, 16384):
        q_NK = torch.full((33, K), fill, dtype=torch.int8)
        found = packed(Int8Weight(q_NK, torch.ones(33)), name)(torch.full((3, K), sign))
        wanted = torch.tensor(float(sign * fill * K * 127)) * torch.tensor(1 / 127)
        assert torch.equal(found, wanted.expand(3, 33))


@sets
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_stay_in_their_row(name: str, value: float) -> None:
    weight, x_MK = int8_weight(40, 70), randn(14, 70)
    wanted = packed(weight, name)(x_MK)
    x_MK[3, 5] = value
    found = packed(weight, name)(x_MK)
    assert not bool(torch.isfinite(found[3]).any())
    others = torch.arange(14) != 3
    assert torch.equal(found[others], wanted[others])


@sets
def test_values_too_small_to_divide_by_are_bounded(name: str) -> None:
    found = packed(int8_weight(40, 70), name)(randn(3, 70) * 1e-38)
    assert float(found.abs().max()) < 1e-32


@sets
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_int8_rows_are_those_that_were_packed(name: str, N: int, K: int) -> None:
    weight = int8_weight(N, K)
    ids = torch.randint(0, N, (9,))
    rows = packed(weight, name).rows(ids)
    assert torch.equal(rows.q_NK, weight.q_NK[ids])
    assert torch.equal(rows.scale_N, weight.scale_N[ids])


def test_other_layouts_of_the_inputs_are_taken() -> None:
    weight = int8_weight(24, 40)
    turned = Int8Weight(weight.q_NK.t().contiguous().t(), weight.scale_N)
    x_MK = randn(40, 5).t()
    found = PackedInt8Linear.pack(turned)(x_MK)
    assert torch.equal(found, reference.int8_linear(x_MK, weight.q_NK, weight.scale_N))


def test_no_rows_give_no_rows() -> None:
    assert PackedInt8Linear.pack(int8_weight(24, 40))(torch.empty(0, 40)).shape == (0, 24)


def test_bytes_are_those_of_the_padded_weights() -> None:
    linear = PackedInt8Linear.pack(int8_weight(33, 40), torch.zeros(33))
    assert linear.nbytes == 64 * 48 + 64 * 4 + 64 * 4
