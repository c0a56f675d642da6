"""Grids and RTN against the compressed-tensors package."""

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from compress.methods import grid
from compress.methods.grid import Grid, make_grid
from compress.methods.rtn import Rtn
from compress.methods.scheme import Scheme
from engine.formats.grouped import GroupedWeight
from engine.formats.int_quantized import Int8Weight

FP8 = Scheme(kind="float8")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 5), (7, 172), (128, 64), (704, 256), (5, 1031)]
ROWS = [
    [0.0, 0.0, 0.0, 0.0],
    [0.0, -0.0, 0.0, 1e-7],
    [127.5, 0.5, 1.5, 2.5],
    [-127.5, -0.5, -1.5, -2.5],
    [127.5, -127.5, 126.5, -126.5],
    [1e4, 1e-4, -1e-4, 0.0],
    [-3e4, 3e4, 1.0, -1.0],
    [1e-5, -1e-5, 5e-6, 0.0],
]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * 0.05).to(dtype)


def check(weight_NK: Tensor, scheme: Scheme) -> None:
    """Scales, zero points and integers must be the package's, bit by bit."""
    before = weight_NK.clone()
    found = make_grid(weight_NK, scheme)
    groups = scheme.groups(weight_NK.shape[1])
    rows = weight_NK.unflatten(1, (groups, -1)).flatten(0, 1)
    type_name = "float" if scheme.kind == "float8" else "int"
    kind = {"num_bits": scheme.bits, "type": type_name, "symmetric": scheme.symmetric}
    args = QuantizationArgs(**kind, strategy="channel")
    low, high = rows.aminmax(dim=1, keepdim=True)
    scale, zero = calculate_qparams(low, high, args)
    q = quantize(rows.float(), scale.float(), zero.float(), args, dtype=scheme.code)
    assert torch.equal(found.scale_NG.reshape(-1, 1), scale)
    assert found.scale_NG.dtype == weight_NK.dtype
    if not scheme.symmetric:
        assert found.zero_NG is not None
        assert torch.equal(found.zero_NG.reshape(-1, 1), zero.to(torch.int8))
    points = found.quantize(weight_NK).view(q.shape)
    assert points.dtype == q.dtype
    assert torch.equal(points.view(torch.uint8), q.view(torch.uint8))
    assert torch.equal(weight_NK, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_bit_equal_with_the_package(shape: tuple[int, int], dtype: torch.dtype, bits: int) -> None:
    check(random(*shape, dtype=dtype), Scheme(bits=bits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_is_bit_equal_with_the_package(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(random(*shape, dtype=dtype), FP8)


def test_fp8_clips_what_the_scale_does_not_reach() -> None:
    weight_NK = torch.tensor([[448.0, 460.0, -465.0, 1e6]])
    grid = Grid(FP8, torch.ones(1, 1))
    assert grid.clipped_share(weight_NK) == 0.5
    assert grid.quantize(weight_NK).float().tolist() == [[448.0, 448.0, -448.0, 448.0]]
    assert make_grid(weight_NK, FP8).clipped_share(weight_NK) == 0


@pytest.mark.parametrize("change", [{"bits": 4}, {"group_size": 8}, {"symmetric": False}])
def test_fp8_has_no_groups_and_no_zero_points(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="FP8 has 8 bits"):
        Scheme(kind="float8", **change)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "size"), [((5, 64), 32), ((3, 12), 4), ((64, 704), 32)])
def test_groups(shape: tuple[int, int], size: int, dtype: torch.dtype) -> None:
    weight_NK = random(*shape, dtype=dtype)
    weight_NK[0] += 1.0
    weight_NK[1] = 0
    check(weight_NK, Scheme(bits=4, group_size=size))


@pytest.mark.parametrize(("shape", "size"), [((5, 64), 32), ((3, 12), 4), ((64, 704), 32)])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_zero_points(shape: tuple[int, int], size: int, bits: int) -> None:
    weight_NK = random(*shape)
    weight_NK[0] += 1.0  # a range that does not hold zero
    check(weight_NK, Scheme(bits=bits, group_size=size, symmetric=False))


def test_zero_is_on_the_grid_of_a_zero_group() -> None:
    found = make_grid(torch.zeros(2, 8), Scheme(bits=4, group_size=4, symmetric=False))
    assert not found.weight(found.quantize(torch.zeros(2, 8))).dequantize().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_bit_equal_on_adversarial_rows(row: list[float], dtype: torch.dtype) -> None:
    check(torch.tensor([row, [1.0, 2.0, 3.0, 4.0]]).to(dtype), Scheme())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_equal_at_the_ends_of_the_range(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    check(torch.tensor([[1e38, -3e38, 1.0], [tiny, -tiny, 0.0]]).to(dtype), Scheme())


def test_groups_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="groups of 32 do not divide 172"):
        make_grid(random(4, 172), Scheme(bits=4, group_size=32))


@pytest.mark.parametrize("change", [{"bits": 1}, {"bits": 9}, {"group_size": 0}])
def test_schemes_that_are_none(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="weights"):
        Scheme(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_mse_search_is_never_worse_and_finds_outliers(bits: int, symmetric: bool) -> None:
    weight_NK = random(32, 64)
    weight_NK[:, 7] *= 6

    def error(scale: str) -> Tensor:
        scheme = Scheme(bits=bits, group_size=32, symmetric=symmetric, scale=scale)  # type: ignore[arg-type]
        found = make_grid(weight_NK, scheme)
        return (found.weight(found.quantize(weight_NK)).dequantize() - weight_NK).square()

    plain, searched = error("absmax"), error("mse")
    groups = [one.unflatten(1, (2, 32)).sum(2) for one in (plain, searched)]
    assert (groups[1] <= groups[0] * (1 + 1e-6)).all()
    assert searched.sum() < plain.sum() * (0.98 if bits < 8 else 1.0 + 1e-6)


def test_rows_do_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_NK, scheme = random(37, 12), Scheme(bits=4, group_size=4, symmetric=False, scale="mse")
    whole = make_grid(weight_NK, scheme)
    monkeypatch.setattr(grid, "_BLOCK_WEIGHTS", 25)
    blocks = make_grid(weight_NK, scheme)
    assert torch.equal(whole.scale_NG, blocks.scale_NG)
    assert torch.equal(whole.quantize(weight_NK), blocks.quantize(weight_NK))
    assert whole.clipped_share(weight_NK) == blocks.clipped_share(weight_NK)


def test_what_rtn_says_of_its_result() -> None:
    weight_NK = random(64, 96, dtype=torch.bfloat16)
    result = Rtn(Scheme()).quantise(weight_NK)
    difference = result.weight.dequantize() - weight_NK.float()
    norms = float(difference.norm() / weight_NK.float().norm())
    assert result.relative_error == pytest.approx(norms, rel=1e-5)
    assert 0 < result.relative_error < 0.01
    assert isinstance(result.weight, Int8Weight)
    in_groups = Rtn(Scheme(bits=4, group_size=32)).quantise(weight_NK)
    assert isinstance(in_groups.weight, GroupedWeight)
    assert result.relative_error < in_groups.relative_error < 0.2
    assert in_groups.outcome.method == "rtn"


def test_clipped_share_counts_what_left_the_grid() -> None:
    # The scale falls between two subnormal halves and is rounded down: 168 steps to the ends.
    weight_NK = torch.tensor([[1e-5, -1e-5, 5e-6, 0.0]], dtype=torch.float16)
    assert Rtn(Scheme()).quantise(weight_NK).clipped_share == 0.5


def test_zero_weight() -> None:
    result = Rtn(Scheme()).quantise(torch.zeros(3, 4))
    assert not result.weight.dequantize().any()
    assert result.relative_error == result.clipped_share == 0


def test_masked_weights_become_zero() -> None:
    weight_NK = random(8, 64)
    mask_NK = random(8, 64) > 0.02
    for symmetric in (True, False):
        scheme = Scheme(bits=4, group_size=32, symmetric=symmetric)
        found = Rtn(scheme).quantise(weight_NK, mask_NK=mask_NK).weight.dequantize()
        assert not found[mask_NK].any()
