"""Sparse native layers on every instruction set: bit-equal to the reference, whatever M."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.formats.int_quantized import Int8Weight
from engine.kernels import reference
from engine.kernels.cpu.library import expands, kernels, supported
from engine.kernels.cpu.linear import PackedInt8Linear
from engine.kernels.cpu.sparse import PackedSparseLinear

ROWS = (1, 2, 5, 8, 12, 13, 33, 65, 200)
SHAPES = [(1, 1), (31, 3), (33, 65), (32, 64), (64, 128), (64, 130), (200, 300)]
# Each set with the processor's instruction where it has one, and without.
sets = pytest.mark.parametrize(
    ("name", "native"), [*((s, False) for s in supported()), (supported()[-1], True)]
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sparse_weight(N: int, K: int, keep: float = 0.5) -> Int8Weight:
    generator = torch.Generator().manual_seed(N + K)
    q_NK = torch.randint(-128, 128, (N, K), generator=generator, dtype=torch.int8)
    q_NK *= torch.rand(N, K, generator=generator) < keep
    return Int8Weight(q_NK, torch.rand(N, generator=generator))


def check(weight: Int8Weight, name: str, native: bool, bias_N: Tensor | None = None) -> None:
    linear = PackedSparseLinear.pack(weight, bias_N, kernels(name), native=native)
    whole = PackedInt8Linear.pack(weight, bias_N, kernels(name))
    for M in ROWS:
        x_MK = randn(M, weight.q_NK.shape[1], seed=M)
        wanted = reference.int8_linear(x_MK, weight.q_NK, weight.scale_N)
        found = linear(x_MK)
        assert torch.equal(found, wanted if bias_N is None else wanted + bias_N), M
        assert torch.equal(found, whole(x_MK)), M


@sets
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.usefixtures("threads")
def test_it_is_bit_equal_for_all_rows(
    name: str, native: bool, N: int, K: int, biased: bool
) -> None:
    check(sparse_weight(N, K), name, native, randn(N, seed=9) if biased else None)


@sets
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.9, 1.0])
def test_it_is_bit_equal_at_any_sparsity(name: str, native: bool, keep: float) -> None:
    check(sparse_weight(70, 390, keep), name, native)


@sets
def test_rows_of_extremes(name: str, native: bool) -> None:
    weight = sparse_weight(70, 390)
    weight.q_NK[3], weight.q_NK[4], weight.q_NK[5] = 0, -128, 127
    weight.q_NK[32:64] = 0  # a panel of nothing
    weight.q_NK[:, ::4] = -128
    check(weight, name, native)


@sets
@pytest.mark.parametrize("most", [4, 8])
def test_shares_of_one_pass_and_of_two(name: str, native: bool, most: int) -> None:
    """More threads than panels, and tiles that they do not divide."""
    weight, before = sparse_weight(64, 2048), torch.get_num_threads()
    linear = PackedSparseLinear.pack(weight, None, kernels(name), native=native)
    try:
        torch.set_num_threads(most)
        for M in (25, 36, 60):
            x_MK = randn(M, 2048, seed=M)
            wanted = reference.int8_linear(x_MK, weight.q_NK, weight.scale_N)
            assert all(torch.equal(linear(x_MK), wanted) for _ in range(20)), M
    finally:
        torch.set_num_threads(before)


@sets
def test_two_of_four(name: str, native: bool) -> None:
    weight = sparse_weight(64, 256, 1.0)
    weight.q_NK.unflatten(1, (-1, 4))[..., ::2] = 0
    check(weight, name, native)


@sets
@pytest.mark.usefixtures("threads")
def test_a_large_layer(name: str, native: bool) -> None:
    """Large enough for several threads, blocks of panels and more than one tile each."""
    weight = sparse_weight(1056, 1040)
    linear = PackedSparseLinear.pack(weight, None, kernels(name), native=native)
    for M in (1, 12, 50):
        x_MK = randn(M, 1040, seed=M)
        wanted = reference.int8_linear(x_MK, weight.q_NK, weight.scale_N)
        assert torch.equal(linear(x_MK), wanted), M


@sets
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_stay_in_their_row(
    name: str, native: bool, value: float
) -> None:
    weight, x_MK = sparse_weight(40, 70), randn(14, 70)
    linear = PackedSparseLinear.pack(weight, None, kernels(name), native=native)
    wanted = linear(x_MK)
    x_MK[3, 5] = value
    found = linear(x_MK)
    assert not bool(torch.isfinite(found[3]).any())
    others = torch.arange(14) != 3
    assert torch.equal(found[others], wanted[others])


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_rows_are_those_that_were_packed(N: int, K: int) -> None:
    weight, bias_N = sparse_weight(N, K), randn(N)
    linear = PackedSparseLinear.pack(weight, bias_N)
    ids = torch.randint(0, N, (9,))
    rows = linear.rows(ids)
    assert torch.equal(rows.q_NK, weight.q_NK[ids])
    assert torch.equal(rows.scale_N, weight.scale_N[ids])
    x_MK = randn(3, K)
    assert torch.equal(linear.dense()(x_MK), linear(x_MK))


def test_no_rows_give_no_rows() -> None:
    assert PackedSparseLinear.pack(sparse_weight(24, 40))(torch.empty(0, 40)).shape == (0, 24)


def test_half_of_the_weights_take_five_bits() -> None:
    weight = sparse_weight(64, 2048)
    linear, whole = PackedSparseLinear.pack(weight), PackedInt8Linear.pack(weight)
    assert linear.nbytes < 0.64 * whole.nbytes


def test_the_processor_is_asked() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    assert expands() == ("avx512_vbmi2" in flags)
