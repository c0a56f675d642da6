"""Mask and kept values: what is written is what was there, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import ModelLoadError
from engine.formats import int_quantized, pack_quantized, sparse
from engine.formats.grouped import GroupedWeight
from engine.formats.int_quantized import Int8Weight
from engine.formats.quant_config import checkpoint_format
from engine.formats.sparse import Structure, pack, unpack

SHAPES = [(1, 1), (3, 7), (8, 32), (5, 172), (17, 100)]


def integers(*shape: int, bits: int, keep: float = 0.5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    q = torch.randint(low, high, shape, generator=generator, dtype=torch.int8)
    return q * (torch.rand(shape, generator=generator) < keep)


def two_of_four(q_NK: Tensor) -> Tensor:
    """At most two of four neighbours stay."""
    order = torch.rand(q_NK.unflatten(1, (-1, 4)).shape).argsort(2)
    return q_NK * (order < 2).flatten(1)


def int8(q_NK: Tensor) -> Int8Weight:
    return Int8Weight(q_NK, torch.rand(len(q_NK)).to(torch.bfloat16))


def same(found: Int8Weight | GroupedWeight, wanted: Int8Weight | GroupedWeight) -> None:
    assert type(found) is type(wanted)
    assert torch.equal(found.q_NK, wanted.q_NK)
    assert torch.equal(found.dequantize(), wanted.dequantize())


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("packed", [False, True])
def test_int8_comes_back(shape: tuple[int, int], keep: float, packed: bool) -> None:
    weight = int8(integers(*shape, bits=8, keep=keep))
    weight.q_NK[0], weight.q_NK[-1, -1] = 0, -128
    tensors = pack(weight, "unstructured", packed=packed)
    assert sparse.is_packed(tensors) == packed
    assert tensors["weight_values"].shape == ((weight.q_NK != 0).sum(),)
    assert tensors["weight_bitmask"].shape == (shape[0], -(-shape[1] // 8))
    assert tensors["weight_row_offsets"][-1] == len(tensors["weight_values"])
    same(unpack(tensors), weight)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("structure", sparse.STRUCTURES)
@pytest.mark.parametrize(("shape", "groups"), [((1, 4), 1), ((5, 64), 2), ((13, 172), 1)])
def test_int4_comes_back(
    shape: tuple[int, int], groups: int, structure: Structure, zeros: bool
) -> None:
    q_NK = two_of_four(integers(*shape, bits=4, keep=0.9))
    zero_NG = integers(shape[0], groups, bits=4, keep=1.0) if zeros else None
    if zero_NG is not None:
        spread = zero_NG.repeat_interleave(shape[1] // groups, 1)
        q_NK = torch.where(q_NK == 0, spread, q_NK)  # what was dropped lies at the zero point
    weight = GroupedWeight(q_NK, torch.rand(shape[0], groups), zero_NG)
    tensors = pack(weight, structure, packed=True)
    assert tensors["weight_values"].dtype == torch.uint8
    assert ("weight_zero_point" in tensors) == zeros
    same(unpack(tensors), weight)


@pytest.mark.parametrize("shape", [(1, 4), (7, 32), (5, 172)])
@pytest.mark.parametrize("packed", [False, True])
def test_two_of_four_has_half_of_the_values(shape: tuple[int, int], packed: bool) -> None:
    weight = int8(two_of_four(integers(*shape, bits=8, keep=0.8)))
    weight.q_NK[0] = 0
    tensors = pack(weight, "2:4", packed=packed)
    assert tensors["weight_values"].shape == (shape[0], shape[1] // 2)
    assert "weight_row_offsets" not in tensors
    same(unpack(tensors), weight)


def test_bits_are_where_the_description_says() -> None:
    q_NK = torch.tensor([[0, 5, 0, 0, -1, 0, 0, 0, 7, 0], [0] * 10], dtype=torch.int8)
    tensors = pack(int8(q_NK), "unstructured", packed=False)
    assert tensors["weight_bitmask"].tolist() == [[0b00010010, 1], [0, 0]]
    assert tensors["weight_values"].tolist() == [5, -1, 7]
    assert tensors["weight_row_offsets"].tolist() == [0, 3, 3]
    assert tensors["weight_shape"].tolist() == [2, 10, 8]
    nibbles = pack(GroupedWeight(q_NK, torch.ones(2, 1)), "unstructured", packed=True)
    assert nibbles["weight_values"].tolist() == [13 | 7 << 4, 15]


def test_two_of_four_cannot_hold_more() -> None:
    with pytest.raises(ValueError, match="more than two"):
        pack(int8(torch.tensor([[1, 1, 1, 0]], dtype=torch.int8)), "2:4", packed=False)
    with pytest.raises(ValueError, match="does not divide"):
        pack(int8(torch.zeros(1, 6, dtype=torch.int8)), "2:4", packed=False)


GOOD = pack(int8(integers(4, 20, bits=8)), "unstructured", packed=False)
HALF = pack(int8(two_of_four(integers(4, 20, bits=8))), "2:4", packed=False)
PACKED = pack(GroupedWeight(integers(4, 20, bits=4), torch.ones(4, 1)), "unstructured", packed=True)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (GOOD | {"weight_bitmask": torch.zeros(4, 2, dtype=torch.uint8)}, "weight_bitmask is"),
        (GOOD | {"weight_bitmask": torch.zeros(4, 3, dtype=torch.int8)}, "weight_bitmask is"),
        (GOOD | {"weight_bitmask": GOOD["weight_bitmask"] | 128}, "after the last column"),
        (GOOD | {"weight_bitmask": GOOD["weight_bitmask"] & 254}, "weight_row_offsets are"),
        (GOOD | {"weight_row_offsets": torch.zeros(5, dtype=torch.int64)}, "weight_row_offsets"),
        (GOOD | {"weight_row_offsets": GOOD["weight_row_offsets"].int()}, "weight_row_offsets"),
        (GOOD | {"weight_values": GOOD["weight_values"][1:]}, "weight_values are"),
        (GOOD | {"weight_values": GOOD["weight_values"].float()}, "weight_values are"),
        (GOOD | {"weight_shape": torch.tensor([4, 20])}, "weight_shape is"),
        (GOOD | {"weight_shape": torch.tensor([4, 20, 3])}, "weight_shape is"),
        (GOOD | {"weight_shape": torch.tensor([0, 20, 8])}, "weight_shape is"),
        (GOOD | {"weight_scale": torch.ones(4, 2)}, "8 bits in groups"),
        (HALF | {"weight_bitmask": HALF["weight_bitmask"] & 254}, "two of four"),
        (HALF | {"weight_shape": torch.tensor([4, 18, 8])}, "after the last column|two of four"),
        (HALF | {"weight_values": HALF["weight_values"].flatten()}, "weight_values are"),
        (PACKED | {"weight_values": PACKED["weight_values"][:-1]}, "weight_values are"),
        (PACKED | {"weight_values": PACKED["weight_values"].to(torch.int8)}, "weight_values are"),
        (PACKED | {"weight_scale": torch.ones(4, 3)}, "3 groups do not divide"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(
    tensors: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        unpack(tensors)


def test_a_half_byte_after_the_last_value_is_refused() -> None:
    q_NK = torch.tensor([[1, 0, 2, 3]], dtype=torch.int8)
    tensors = pack(GroupedWeight(q_NK, torch.ones(1, 1)), "unstructured", packed=True)
    tensors["weight_values"][-1] |= 16
    with pytest.raises(ValueError, match="after the last one"):
        unpack(tensors)


def config(**change: Any) -> dict[str, Any]:
    group = sparse.config_group(int_quantized.config_group(["Linear"]), "2:4")
    groups = {"group_0": group | change}
    quantization = {"quant_method": "compressed-tensors", "config_groups": groups}
    return {"quantization_config": quantization | {"format": group["format"]}}


def test_the_configuration_says_what_it_is() -> None:
    assert checkpoint_format(config()) == "compressed-tensors/venturi-sparse-int-quantized"
    packed = sparse.config_group(
        pack_quantized.config_group(["Linear"], 4, 32, symmetric=True), "unstructured"
    )
    whole = config(**packed)
    whole["quantization_config"]["format"] = packed["format"]
    assert checkpoint_format(whole) == "compressed-tensors/venturi-sparse-pack-quantized"
    for change in ({"sparsity": "1:4"}, {"input_activations": None}, {"format": "sparse-bitmask"}):
        with pytest.raises(ModelLoadError, match="quantization_config"):
            checkpoint_format(config(**change))


def test_it_is_smaller(tmp_path: Path) -> None:
    weight = int8(integers(64, 1024, bits=8))
    for structure, most in (("unstructured", 5.1), ("2:4", 5.0)):
        if structure == "2:4":
            weight = int8(two_of_four(weight.q_NK))
        tensors = pack(weight, structure, packed=False)  # type: ignore[arg-type]
        del tensors["weight_scale"], tensors["weight_shape"]
        assert 8 * sum(t.nbytes for t in tensors.values()) / weight.q_NK.numel() < most + 0.05
