"""What rounding the weights of the values costs attention on INT8 pages, in adverse cases too."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from engine.kernels import reference
from engine.kernels.cpu.attention import AttentionOptions, paged_attention
from engine.kv_cache import InterleavedInt8KvCache, KvShape

DIM, HEADS, BLOCK = 64, 3, 16


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@dataclass(frozen=True)
class Text:
    """Queries of the last position, keys and values of all; one KV head."""

    q_1HD: Tensor
    k_S1D: Tensor
    v_S1D: Tensor

    @classmethod
    def random(cls, length: int) -> "Text":
        generator = torch.Generator().manual_seed(9)
        sizes = (1, HEADS, DIM), (length, 1, DIM), (length, 1, DIM)
        return cls(*(torch.randn(size, generator=generator) for size in sizes))

    def attend(self) -> tuple[Tensor, Tensor, Tensor]:
        """The native output, and the keys and values that were in its pages."""
        length = len(self.k_S1D)
        blocks = -(-length // BLOCK)
        shape = KvShape(layers=1, kv_heads=1, head_dim=DIM, block_size=BLOCK)
        cache, table = InterleavedInt8KvCache(shape, blocks), torch.arange(blocks)
        cache.write(0, self.k_S1D, self.v_S1D, torch.arange(length))
        sequence = torch.tensor([[0, 1, length, 0]], dtype=torch.int32)
        options = AttentionOptions(scale=DIM**-0.5)
        out = paged_attention(self.q_1HD, cache.layers[0], sequence, table.int(), options)
        k, v = cache.read(0, table[None], torch.tensor([length]))
        return out, *(x[0, :, :length].transpose(0, 1).double() for x in (k, v))


def random_scores(text: Text) -> None:
    pass


def all_weigh_the_same(text: Text) -> None:
    text.q_1HD[:] = 0.0


def one_dominates(text: Text) -> None:
    text.k_S1D[:] *= 1e-3
    text.k_S1D[1000] = text.q_1HD[0, 0] * 4


def scales_differ(text: Text) -> None:
    """Some values are ten thousand times as large as others, some are 0."""
    text.v_S1D[::7] *= 1e4
    text.v_S1D[3::11] = 0.0


def one_is_huge(text: Text) -> None:
    """A value that one head hardly looks at is so large that it counts."""
    text.v_S1D[300] *= 1e4
    text.k_S1D[300] = -3 * text.q_1HD[0, 0]


def values_are_tiny(text: Text) -> None:
    text.v_S1D[:] *= 1e-30


@pytest.mark.parametrize(
    "change",
    [
        random_scores,
        all_weigh_the_same,
        one_dominates,
        scales_differ,
        one_is_huge,
        values_are_tiny,
    ],
)
@pytest.mark.parametrize("length", [1001, 8192])
def test_it_costs_little_beside_the_rounding_of_values(
    change: Callable[[Text], None], length: int
) -> None:
    text = Text.random(length)
    change(text)
    found, k, v = text.attend()
    exact = reference.int8_attention(text.q_1HD, k, v, levels=None)
    unrounded = reference.int8_attention(text.q_1HD, k, text.v_S1D.double(), levels=None)
    assert rms(found - exact) <= 0.05 * rms(exact - unrounded)
    assert float((found - exact).abs().max()) <= 3e-4 * float(exact.abs().max())


def test_values_of_zero_give_zero() -> None:
    text = Text.random(300)
    text.v_S1D[:] = 0.0
    assert not bool(text.attend()[0].any())
