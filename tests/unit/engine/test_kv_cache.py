"""KV caches: what is written is read, through any table, and nothing else is."""

import pytest
import torch
from torch import Tensor

from engine.kv_cache import CACHES, KvCache, KvShape

SHAPES = [
    KvShape(layers=1, kv_heads=1, head_dim=2, block_size=1),
    KvShape(layers=2, kv_heads=3, head_dim=10, block_size=5),
    KvShape(layers=2, kv_heads=2, head_dim=32, block_size=16),
]
DTYPES = list(CACHES)


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def slots(table: list[int], tokens: range, block_size: int) -> Tensor:
    return torch.tensor([table[p // block_size] * block_size + p % block_size for p in tokens])


def tolerance(dtype: str, x_TJD: Tensor) -> Tensor:
    """Largest error of each vector's values: none, or half a step of its own scale."""
    if dtype == "fp32":
        return torch.zeros(*x_TJD.shape[:2], 1)
    return x_TJD.abs().amax(-1, keepdim=True) / 254 * (1 + 1e-4)


def fill(
    cache: KvCache, shape: KvShape, table: list[int], length: int, seed: int, layer: int = 0
) -> tuple[Tensor, Tensor]:
    """Writes ``length`` random tokens in uneven chunks; returns keys and values [T, J, D]."""
    k, v = (randn(length, shape.kv_heads, shape.head_dim, seed=seed + n, scale=3) for n in (0, 1))
    start = 0
    while start < length:
        end = min(length, start + 1 + (start * 7 + seed) % 5)
        where = slots(table, range(start, end), shape.block_size)
        cache.write(layer, k[start:end], v[start:end], where)
        start = end
    return k, v


def assert_holds(cache: KvCache, read: Tensor, written_TJD: Tensor) -> None:
    """``read`` [J, S, D] is ``written`` to within the cache's precision, zero after it."""
    length = len(written_TJD)
    error = (read[:, :length].transpose(0, 1) - written_TJD).abs()
    assert bool((error <= tolerance(cache.dtype, written_TJD)).all())
    assert not bool(read[:, length:].any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sequences_of_different_lengths_read_their_own_tokens(dtype: str, shape: KvShape) -> None:
    cache = CACHES[dtype](shape, 12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3)).tolist()
    tables = [order[:1], order[1:5], order[5:7]]
    lengths = [1, 4 * shape.block_size, 2 * shape.block_size - shape.block_size // 2]
    written = [
        fill(cache, shape, table, length, seed=10 * n)
        for n, (table, length) in enumerate(zip(tables, lengths, strict=True))
    ]
    padded = torch.tensor([table + [0] * (4 - len(table)) for table in tables])
    keys, values = cache.read(0, padded, torch.tensor(lengths))
    assert keys.shape == values.shape
    assert keys.shape == (3, shape.kv_heads, 4 * shape.block_size, shape.head_dim)
    assert keys.dtype == values.dtype == torch.float32
    for n, (k, v) in enumerate(written):
        assert_holds(cache, keys[n], k)
        assert_holds(cache, values[n], v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_do_not_mix(dtype: str) -> None:
    shape = SHAPES[1]
    cache = CACHES[dtype](shape, 3)
    written = [fill(cache, shape, [2, 0], 7, seed=5 * layer, layer=layer) for layer in (0, 1)]
    for layer, (k, v) in enumerate(written):
        keys, values = cache.read(layer, torch.tensor([[2, 0]]), torch.tensor([7]))
        assert_holds(cache, keys[0], k)
        assert_holds(cache, values[0], v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reading_does_not_depend_on_how_the_tokens_were_written(dtype: str) -> None:
    shape = SHAPES[1]
    k, v = randn(9, 3, 10), randn(9, 3, 10, seed=1)
    at_once, one_by_one = CACHES[dtype](shape, 2), CACHES[dtype](shape, 2)
    where = slots([1, 0], range(9), shape.block_size)
    at_once.write(0, k, v, where)
    for token in range(9):
        one_by_one.write(0, k[token : token + 1], v[token : token + 1], where[token : token + 1])
    for a, b in zip(
        at_once.read(0, torch.tensor([[1, 0]]), torch.tensor([9])),
        one_by_one.read(0, torch.tensor([[1, 0]]), torch.tensor([9])),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_extreme_vectors_are_held(dtype: str, value: float) -> None:
    shape = SHAPES[1]
    cache = CACHES[dtype](shape, 1)
    x = torch.zeros(2, 3, 10)
    x[:, :, 4] = value
    x[:, 1, 7] = -value / 3
    cache.write(0, x, -x, torch.tensor([0, 3]))
    keys, values = cache.read(0, torch.tensor([[0]]), torch.tensor([5]))
    assert torch.allclose(keys[0, :, [0, 3]].transpose(0, 1), x, rtol=0.01, atol=value / 250)
    assert torch.allclose(values[0, :, [0, 3]].transpose(0, 1), -x, rtol=0.01, atol=value / 250)


def test_an_outlier_costs_only_its_own_head_and_token() -> None:
    shape = SHAPES[2]
    cache = CACHES["int8"](shape, 1)
    x = randn(3, 2, 32)
    x[1, 0, 5] = 1e4
    cache.write(0, x, x, torch.arange(3))
    keys, _ = cache.read(0, torch.tensor([[0]]), torch.tensor([3]))
    error = (keys[0, :, :3].transpose(0, 1) - x).abs().amax(-1)
    assert float(error[1, 0]) > 0.1
    error[1, 0] = 0
    assert float(error.max()) < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_an_earlier_owner_left_never_shows(dtype: str) -> None:
    """Not after a context's end, not in padding, and not where it was NaN or infinite."""
    shape = SHAPES[1]
    cache = CACHES[dtype](shape, 4)
    for bad in (float("nan"), float("inf"), 1e20):
        stale = torch.full((20, 3, 10), bad)
        cache.write(0, stale, stale, torch.arange(20))
        k, v = fill(cache, shape, [2, 1], 6, seed=1)
        tables, lengths = torch.tensor([[2, 1, 0], [3, 0, 0]]), torch.tensor([6, 0])
        keys, values = cache.read(0, tables, lengths)
        assert_holds(cache, keys[0], k)
        assert_holds(cache, values[0], v)
        assert not bool(keys[1].any())
        assert not bool(values[1].any())


def test_a_vector_that_is_not_finite_stays_so_and_alone() -> None:
    """Its request must end as broken, not go on with numbers made up."""
    shape = SHAPES[1]
    for dtype in DTYPES:
        cache = CACHES[dtype](shape, 1)
        x = randn(3, 3, 10)
        x[1, 2, 0] = float("nan")
        cache.write(0, x, x, torch.arange(3))
        keys, _ = cache.read(0, torch.tensor([[0]]), torch.tensor([3]))
        broken = ~torch.isfinite(keys[0, :, :3]).all(-1)
        assert broken.nonzero().tolist() == [[2, 1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_block_bytes_are_those_in_memory(dtype: str, shape: KvShape) -> None:
    kind = CACHES[dtype]
    assert kind(shape, 7).nbytes == 7 * kind.block_bytes(shape)


def test_int8_takes_about_a_quarter_of_fp32() -> None:
    int8, fp32 = (CACHES[name].block_bytes(SHAPES[2]) for name in ("int8", "fp32"))
    assert int8 == fp32 * (32 + 4) // (32 * 4)
