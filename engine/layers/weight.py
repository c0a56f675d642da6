"""Weights as they will be executed, and several with the same input joined into one.

Shape letters: K in-features, N out-features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.formats.float_quantized import Float8Weight
from engine.formats.grouped import GroupedWeight
from engine.formats.int_quantized import Int8Weight

# Rows are rounded in blocks of so many weights, so that no float32 copy of a whole head is held.
_BLOCK_WEIGHTS = 1 << 20


@dataclass(frozen=True, slots=True)
class WeightOnly:
    """A quantised weight that is executed with float activations.

    ``order_K``: its columns are those of the input in this order; None: as they lie.
    """

    weight: GroupedWeight | Int8Weight
    order_K: Tensor | None = None

    @property
    def bits(self) -> int:
        """Of the stored integers."""
        return 8 if isinstance(self.weight, Int8Weight) else self.weight.bits


@dataclass(frozen=True, slots=True)
class SparseWeight:
    """An int8 weight of which so much is 0 that its zeros may be left out."""

    weight: Int8Weight


# A weight as it will be executed: floating point [N, K], or quantised.
Weight = Tensor | Int8Weight | GroupedWeight | Float8Weight | WeightOnly | SparseWeight


def out_features(weight: Weight) -> int:
    """N of a weight [N, K]."""
    stored = weight.weight if isinstance(weight, WeightOnly | SparseWeight) else weight
    return (stored if isinstance(stored, Tensor) else stored.q_NK).shape[0]


def take_rows(weight: Weight, order_N: Tensor) -> Weight:
    """The out-features ``order_N`` of a weight."""
    match weight:
        case Int8Weight():
            return Int8Weight(weight.q_NK[order_N], weight.scale_N[order_N])
        case GroupedWeight() | Float8Weight():
            return weight.rows(order_N)
        case WeightOnly():
            rows = take_rows(weight.weight, order_N)
            assert isinstance(rows, Int8Weight | GroupedWeight)
            return WeightOnly(rows, weight.order_K)
        case SparseWeight(Int8Weight(q_NK, scale_N)):
            return SparseWeight(Int8Weight(q_NK[order_N], scale_N[order_N]))
        case _:
            return weight[order_N]


def kind(weight: Weight) -> tuple[object, ...]:
    """Weights of one kind can be one layer."""
    if isinstance(weight, WeightOnly):
        order = () if weight.order_K is None else tuple(weight.order_K.tolist())
        return (WeightOnly, order, *kind(weight.weight))
    if isinstance(weight, GroupedWeight):
        return (GroupedWeight, weight.group, weight.bits, weight.zero_NG is None)
    return (type(weight),)


def joined(weights: Sequence[Weight]) -> Weight:
    """One of several of a kind."""
    if len(weights) == 1:
        return weights[0]
    if only := [weight for weight in weights if isinstance(weight, WeightOnly)]:
        stored = joined([weight.weight for weight in only])
        assert isinstance(stored, Int8Weight | GroupedWeight)
        return WeightOnly(stored, only[0].order_K)
    if sparse := [weight.weight for weight in weights if isinstance(weight, SparseWeight)]:
        whole = joined(sparse)
        assert isinstance(whole, Int8Weight)
        return SparseWeight(whole)
    if in_bytes := [weight for weight in weights if isinstance(weight, Int8Weight | Float8Weight)]:
        scales = [weight.scale_N.float() for weight in in_bytes]
        joined_NK = torch.cat([weight.q_NK for weight in in_bytes])
        return replace(in_bytes[0], q_NK=joined_NK, scale_N=torch.cat(scales))
    if grouped := [weight for weight in weights if isinstance(weight, GroupedWeight)]:
        zeros = [weight.zero_NG for weight in grouped if weight.zero_NG is not None]
        return replace(
            grouped[0],
            q_NK=torch.cat([weight.q_NK for weight in grouped]),
            scale_NG=torch.cat([weight.scale_NG.float() for weight in grouped]),
            zero_NG=torch.cat(zeros) if zeros else None,
        )
    return torch.cat([weight.float() for weight in weights if isinstance(weight, Tensor)])


def quantize_int8(weight_NK: Tensor) -> Int8Weight:
    """Round to nearest, symmetric per out-feature: for a head that is quantised at load.

    Scale = absmax / 127.5 and the range [-128, 127], as compressed-tensors has it.
    """
    q_NK = torch.empty(weight_NK.shape, dtype=torch.int8)
    scale_N = torch.empty(len(weight_NK))
    step = max(1, _BLOCK_WEIGHTS // weight_NK.shape[1])
    for first in range(0, len(weight_NK), step):
        rows = slice(first, first + step)
        part_NK = weight_NK[rows].float()
        absmax_N = part_NK.abs().amax(1)
        scale_N[rows] = torch.where(absmax_N > 0, absmax_N / 127.5, 1.0)
        q_NK[rows] = (part_NK / scale_N[rows, None]).round_().clamp_(-128, 127)
    return Int8Weight(q_NK, scale_N)
