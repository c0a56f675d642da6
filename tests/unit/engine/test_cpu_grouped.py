"""Native layers of grouped weights: near the reference, and equal on all instruction sets."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from engine.formats.grouped import GroupedWeight
from engine.formats.int_quantized import Int8Weight
from engine.kernels import reference
from engine.kernels.cpu.grouped import PackedGroupedLinear, per_channel
from engine.kernels.cpu.library import kernels, supported

ROWS = (1, 2, 5, 8, 13, 33, 64, 65, 200)
SHAPES = [(1, 1, 32), (31, 3, 64), (33, 65, 32), (64, 100, 128), (200, 320, 64), (96, 256, 128)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
Kind = Literal["int8", "float32"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grouped(
    N: int,
    K: int,
    group: int,
    *,
    zeros: bool = False,
    bits: int = 4,
    dtype: torch.dtype = torch.float16,
) -> GroupedWeight:
    generator, groups = torch.Generator().manual_seed(N), -(-K // group)
    low = -(1 << bits - 1)
    q_NK = torch.randint(low, low + (1 << bits), (N, K), generator=generator).to(torch.int8)
    scale_NG = (torch.rand(N, groups, generator=generator) + 0.01).to(dtype)
    zero_NG = None
    if zeros:
        zero_NG = torch.randint(low, -low, (N, groups), generator=generator).to(torch.int8)
    return GroupedWeight(q_NK, scale_NG, zero_NG, group, bits)


def wanted(weight: GroupedWeight, kind: Kind, x_MK: Tensor) -> Tensor:
    if kind == "int8":
        return reference.int4_linear(x_MK, weight)
    return reference.weight_only_linear(x_MK, weight)


def check(weight: GroupedWeight, kind: Kind, bias_N: Tensor | None = None) -> None:
    """All rows, sets and threads: near the reference, and bit-equal to each other."""
    K = weight.q_NK.shape[1]
    layers = [PackedGroupedLinear.pack(weight, kind, bias_N, kernels(n)) for n in supported()]
    tolerance = 1e-6 if kind == "int8" else 1e-5
    before = torch.get_num_threads()
    for M in ROWS:
        x_MK = randn(M, K, seed=M)
        first = layers[0](x_MK)
        target = wanted(weight, kind, x_MK) + (0 if bias_N is None else bias_N)
        most = float(target.abs().max())
        assert torch.allclose(first, target, rtol=tolerance, atol=tolerance * most), M
        for layer in layers:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                assert torch.equal(layer(x_MK), first), (layer.product, M, threads)
            assert torch.equal(layer(x_MK[M // 2 :][:1])[0], first[M // 2]), (layer.product, M)
    torch.set_num_threads(before)


@pytest.mark.parametrize(("N", "K", "group"), SHAPES)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("kind", ["int8", "float32"])
def test_int4_is_near_the_reference(N: int, K: int, group: int, zeros: bool, kind: Kind) -> None:
    check(grouped(N, K, group, zeros=zeros), kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["int8", "float32"])
def test_scales_are_exact_in_their_dtype(dtype: torch.dtype, kind: Kind) -> None:
    weight = grouped(40, 96, 32, dtype=dtype)
    check(weight, kind, bias_N=randn(40, seed=3))
    layer = PackedGroupedLinear.pack(weight, kind)
    per_group = 32 * dtype.itemsize + 32 * 32 // 2
    assert layer.nbytes == 2 * 3 * per_group


@pytest.mark.parametrize(("N", "K", "group"), SHAPES)
@pytest.mark.parametrize("zeros", [False, True])
def test_int8_in_groups_is_near_the_reference(N: int, K: int, group: int, zeros: bool) -> None:
    check(grouped(N, K, group, bits=8, zeros=zeros), "float32")


@pytest.mark.parametrize(("N", "K"), [(1, 1), (33, 65), (64, 100)])
def test_int8_per_channel_with_float_activations(N: int, K: int) -> None:
    weight = grouped(N, K, 4096, bits=8, dtype=torch.float32)
    channels = per_channel(Int8Weight(weight.q_NK, weight.scale_NG[:, 0]))
    check(channels, "float32")
    found = PackedGroupedLinear.pack(channels, "float32")(randn(3, K))
    assert torch.allclose(found, randn(3, K) @ weight.dequantize().t(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", supported())
@pytest.mark.parametrize("kind", ["int8", "float32"])
def test_extreme_values(name: str, kind: Kind) -> None:
    weight = grouped(40, 128, 128, zeros=True)
    weight.q_NK[3], weight.q_NK[4] = 7, -8
    assert weight.zero_NG is not None
    weight.zero_NG[3], weight.zero_NG[4] = -8, 7
    x_MK = randn(5, 128)
    x_MK[0], x_MK[1], x_MK[2], x_MK[3, 7] = 0.0, 1.0, -1.0, 1e4
    found = PackedGroupedLinear.pack(weight, kind, None, kernels(name))(x_MK)
    target = wanted(weight, kind, x_MK)
    assert torch.allclose(found, target, rtol=1e-5, atol=1e-5 * float(target.abs().max()))
    assert not bool(found[0].any())
    x_MK[2, 5] = torch.nan
    again = PackedGroupedLinear.pack(weight, kind, None, kernels(name))(x_MK)
    assert bool(again[2].isnan().all())
    assert torch.equal(again[[0, 1, 3, 4]], found[[0, 1, 3, 4]])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [False, True])
def test_rows_are_those_that_were_packed(bits: int, dtype: torch.dtype, zeros: bool) -> None:
    weight = grouped(70, 100, 32, zeros=zeros, bits=bits, dtype=dtype)
    ids = torch.tensor([0, 69, 31, 32, 5])
    rows = PackedGroupedLinear.pack(weight, "float32").rows(ids)
    assert torch.equal(rows.q_NK, weight.q_NK[ids])
    assert torch.equal(rows.dequantize(), weight.rows(ids).dequantize())


def test_what_has_no_kernel_is_refused() -> None:
    for weight in (grouped(8, 48, 48), grouped(8, 256, 256), grouped(8, 64, 32, bits=8)):
        with pytest.raises(ValueError, match="in groups of"):
            PackedGroupedLinear.pack(weight, "int8")


def test_what_is_reported() -> None:
    layer = PackedGroupedLinear.pack(grouped(32, 64, 32), "int8")
    assert (layer.storage, layer.execution) == ("int4", "int4 x int8")
    assert PackedGroupedLinear.pack(grouped(32, 64, 32), "float32").execution == "int4 x float32"
