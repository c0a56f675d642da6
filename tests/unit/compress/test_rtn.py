"""RTN against the compressed-tensors package."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from compress.methods import METHODS, load_method, rtn
from engine.formats import int_quantized

ARGS = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 5), (7, 172), (128, 64), (704, 256), (5, 1031)]


def oracle(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    low_N1, high_N1 = weight_NK.aminmax(dim=1, keepdim=True)
    scale_N1, zero_N1 = calculate_qparams(low_N1, high_N1, ARGS)
    q_NK = quantize(weight_NK.float(), scale_N1.float(), zero_N1.float(), ARGS, dtype=torch.int8)
    return q_NK, scale_N1[:, 0]


def check(weight_NK: Tensor) -> None:
    before = weight_NK.clone()
    result = rtn.Rtn().apply(weight_NK)
    q_NK, scale_N = oracle(weight_NK)
    assert torch.equal(result.weight.scale_N, scale_N)
    assert torch.equal(result.weight.q_NK, q_NK)
    assert result.weight.q_NK.dtype == torch.int8
    assert result.weight.scale_N.dtype == weight_NK.dtype
    assert torch.equal(weight_NK, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bit_equal_with_the_package(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    check((torch.randn(shape, generator=generator) * 0.05).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "row",
    [
        [0.0, 0.0, 0.0, 0.0],
        [0.0, -0.0, 0.0, 1e-7],
        [127.5, 0.5, 1.5, 2.5],
        [-127.5, -0.5, -1.5, -2.5],
        [127.5, -127.5, 126.5, -126.5],
        [1e4, 1e-4, -1e-4, 0.0],
        [-3e4, 3e4, 1.0, -1.0],
        [1e-5, -1e-5, 5e-6, 0.0],
    ],
)
def test_bit_equal_on_adversarial_rows(row: list[float], dtype: torch.dtype) -> None:
    check(torch.tensor([row, [1.0, 2.0, 3.0, 4.0]]).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_equal_at_the_ends_of_the_range(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    check(torch.tensor([[1e38, -3e38, 1.0], [tiny, -tiny, 0.0]]).to(dtype))


def test_rows_do_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_NK = torch.randn(37, 11, generator=torch.Generator().manual_seed(0))
    whole = rtn.Rtn().apply(weight_NK)
    monkeypatch.setattr(rtn, "_BLOCK_WEIGHTS", 25)
    blocks = rtn.Rtn().apply(weight_NK)
    assert torch.equal(whole.weight.q_NK, blocks.weight.q_NK)
    assert blocks.relative_error == pytest.approx(whole.relative_error, rel=1e-9)


def test_stats_are_what_they_say() -> None:
    weight_NK = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    result = rtn.Rtn().apply(weight_NK)
    difference = result.weight.dequantize() - weight_NK.float()
    assert result.relative_error == pytest.approx(
        float(difference.norm() / weight_NK.float().norm()), rel=1e-5
    )
    assert 0 < result.relative_error < 0.01
    assert result.nbytes == 64 * 96 + 64 * 2
    assert result.seconds > 0


def test_clipped_share_counts_what_left_the_grid() -> None:
    # The scale falls between two subnormal halves and is rounded down: 168 steps to the ends.
    weight_NK = torch.tensor([[1e-5, -1e-5, 5e-6, 0.0]], dtype=torch.float16)
    assert rtn.Rtn().apply(weight_NK).clipped_share == 0.5


def test_zero_weight() -> None:
    result = rtn.Rtn().apply(torch.zeros(3, 4))
    assert not result.weight.q_NK.any()
    assert (result.weight.scale_N > 0).all()
    assert result.relative_error == result.clipped_share == 0


def test_pack_and_unpack_are_inverse() -> None:
    weight = rtn.Rtn().apply(torch.randn(6, 10).bfloat16()).weight
    packed = int_quantized.pack(weight)
    again = int_quantized.unpack(packed)
    assert {k: list(v.shape) for k, v in packed.items()} == {
        "weight": [6, 10],
        "weight_scale": [6, 1],
    }
    assert torch.equal(again.q_NK, weight.q_NK)
    assert torch.equal(again.scale_N, weight.scale_N)


def test_the_registry_loads_each_method() -> None:
    for name in METHODS:
        assert callable(load_method(name).apply)
