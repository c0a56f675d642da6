"""The packed format against the compressed-tensors package, and what is refused."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor

from engine.formats import pack_quantized
from engine.formats.grouped import GroupedWeight
from engine.formats.int_quantized import Int8Weight
from engine.formats.pack_quantized import pack, pack_rows, unpack, unpack_rows

SHAPES = [(1, 1), (3, 7), (8, 32), (5, 172), (16, 704)]


def integers(*shape: int, bits: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_words_are_the_packages(shape: tuple[int, int], bits: int) -> None:
    q_NK = integers(*shape, bits=bits)
    words = pack_rows(q_NK, bits)
    assert torch.equal(words, pack_to_int32(q_NK, bits))
    assert torch.equal(unpack_rows(words, bits, shape[1]), q_NK)


@pytest.mark.parametrize(
    ("shape", "groups", "zeros", "bits"),
    [
        (shape, groups, zeros, bits)
        for shape, groups in [((8, 32), 1), ((5, 64), 2), ((13, 704), 22)]
        for zeros in (True, False)
        for bits in (4, 8)
        if bits == 4 or groups > 1 or zeros  # else an Int8Weight, see below
    ],
)
def test_pack_and_unpack_are_inverse(
    shape: tuple[int, int], groups: int, zeros: bool, bits: int
) -> None:
    zero_NG = integers(shape[0], groups, bits=bits) if zeros else None
    weight = GroupedWeight(
        integers(*shape, bits=bits), torch.rand(shape[0], groups), zero_NG, bits=bits
    )
    again = unpack(pack(weight))
    assert isinstance(again, GroupedWeight)
    assert again.bits == bits
    assert torch.equal(again.q_NK, weight.q_NK)
    assert torch.equal(again.scale_NG, weight.scale_NG)
    assert (again.zero_NG is None) == (zero_NG is None)
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_int8_weights_are_packed_too() -> None:
    weight = Int8Weight(integers(6, 20, bits=8), torch.rand(6))
    tensors = pack(weight)
    assert tensors["weight_packed"].shape == (6, 5)
    again = unpack(tensors)
    assert isinstance(again, Int8Weight)
    assert torch.equal(again.q_NK, weight.q_NK)
    assert torch.equal(again.scale_N, weight.scale_N)


def test_dequantize() -> None:
    weight = GroupedWeight(
        torch.tensor([[-8, 7, 0, 1]], dtype=torch.int8),
        torch.tensor([[0.5, 2.0]]),
        torch.tensor([[-1, 3]], dtype=torch.int8),
    )
    assert weight.dequantize().tolist() == [[-3.5, 4.0, -6.0, -4.0]]


GOOD = pack(GroupedWeight(integers(4, 64, bits=4), torch.rand(4, 2), integers(4, 2, bits=4)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_packed": torch.zeros(4, 6, dtype=torch.int32)}, "of 3, 5, 6 and 7 bits"),
        ({"weight_packed": torch.zeros(3, 8, dtype=torch.int32)}, "weight_packed is"),
        ({"weight_packed": torch.zeros(4, 8)}, "weight_packed is"),
        ({"weight_scale": torch.ones(4, 3)}, "3 groups do not divide 64"),
        ({"weight_scale": torch.ones(4, 0)}, "0 groups"),
        ({"weight_scale": torch.ones(5, 2)}, "weight_scale must be"),
        ({"weight_scale": torch.ones(4, 2, dtype=torch.int8)}, "weight_scale must be"),
        ({"weight_zero_point": torch.zeros(4, 2, dtype=torch.int8)}, "weight_zero_point is"),
    ],
)
def test_tensors_that_are_refused(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_quantized.unpack(GOOD | change)
