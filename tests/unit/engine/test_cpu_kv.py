"""Native writing of INT8 pages and rotary positions: the torch cache's numbers, bit for bit."""

import pytest
import torch
from torch import Tensor

from engine.errors import ModelLoadError
from engine.kernels.cpu.kv import rotate_and_write
from engine.kv_cache import InterleavedInt8KvCache, KvShape, cache_class
from engine.kv_cache.fp32 import Fp32KvCache
from engine.kv_cache.int8 import Int8KvCache
from engine.layers.rotary import Rotary, rotate_part
from engine.models.spec import RopeSpec

TOKENS = 37
TABLE = [3, 0, 4, 1, 2]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shape_of(head_dim: int, block_size: int = 16, kv_heads: int = 3) -> KvShape:
    return KvShape(layers=2, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size)


def slots(block_size: int) -> Tensor:
    return torch.tensor(
        [TABLE[p // block_size] * block_size + p % block_size for p in range(TOKENS)]
    )


def assert_same(native: InterleavedInt8KvCache, plain: Int8KvCache) -> None:
    where = (1, torch.tensor([TABLE, TABLE]), torch.tensor([TOKENS, 5]))
    for found, wanted in zip(native.read(*where), plain.read(*where), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("head_dim", [1, 2, 8, 10, 24, 64, 80, 128, 256])
@pytest.mark.parametrize("block_size", [16, 48])
def test_pages_hold_what_the_torch_cache_holds(head_dim: int, block_size: int) -> None:
    shape = shape_of(head_dim, block_size)
    native, plain = InterleavedInt8KvCache(shape, 5), Int8KvCache(shape, 5)
    k, v = randn(TOKENS, 3, head_dim), randn(TOKENS, 3, head_dim, seed=1)
    k[4] = v[6] = 0.0
    k[5, 1, 0] = v[9, 2, -1] = 1e4
    k[7] *= 1e-30
    v[8] *= 1e30
    k[10] = torch.arange(head_dim) / 2 - 3  # ties where absmax is 127 / 2 ** n
    k[10, :, 0] = 63.5
    for cache in (native, plain):
        cache.write(1, k, v, slots(block_size))
    assert_same(native, plain)


@pytest.mark.parametrize("seed", range(5))
def test_rounding_is_the_torch_caches_on_many_vectors(seed: int) -> None:
    shape = shape_of(64, 256, kv_heads=8)
    native, plain = InterleavedInt8KvCache(shape, 5), Int8KvCache(shape, 5)
    k, v = randn(1000, 8, 64, seed=seed), randn(1000, 8, 64, seed=seed + 100)
    where = (1, torch.tensor([[0, 1, 2, 3, 4]]), torch.tensor([1000]))
    for cache in (native, plain):
        cache.write(1, k, v, torch.arange(1000))
    for found, wanted in zip(native.read(*where), plain.read(*where), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(("head_dim", "turned"), [(2, 2), (64, 64), (80, 32), (24, 6), (128, 64)])
@pytest.mark.parametrize("fused", [False, True])
def test_rotation_and_write_are_those_of_torch(head_dim: int, turned: int, fused: bool) -> None:
    shape, H = shape_of(head_dim), 6
    native, plain = InterleavedInt8KvCache(shape, 5), Int8KvCache(shape, 5)
    rotary = Rotary(RopeSpec(dim=turned, theta=10000.0, amplitude=1.3), 100)
    cos, sin = rotary.tables(torch.arange(50, 50 + TOKENS))
    qkv = randn(TOKENS, (H + 6) * head_dim)
    parts = qkv.split((H * head_dim, 3 * head_dim, 3 * head_dim), dim=1)
    q, k, v = (part.unflatten(1, (-1, head_dim)) for part in parts)
    turned_q, turned_k = rotate_part(q, cos, sin), rotate_part(k, cos, sin)
    plain.write(1, turned_k, v, slots(16))
    if not fused:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    before = v.clone()
    rotate_and_write(q, k, v, (cos, sin), slots(16), native.layers[1])
    assert torch.equal(q, turned_q)
    assert torch.equal(k, turned_k)
    assert torch.equal(v, before)
    assert_same(native, plain)


def test_padding_is_never_read() -> None:
    """Heads are padded to whole vectors; a page's garbage there must not count."""
    shape = shape_of(10)
    native = InterleavedInt8KvCache(shape, 5)
    native.pages.fill_(255)
    k, v = randn(TOKENS, 3, 10), randn(TOKENS, 3, 10, seed=1)
    native.write(1, k, v, slots(16))
    keys, values = native.read(1, torch.tensor([TABLE]), torch.tensor([TOKENS]))
    assert keys.shape == values.shape == (1, 3, 80, 10)
    assert torch.allclose(keys[0, :, :TOKENS].transpose(0, 1), k, atol=0.02)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_vector_that_is_not_finite_stays_so_and_alone(bad: float) -> None:
    shape = shape_of(24)
    native = InterleavedInt8KvCache(shape, 5)
    k, v = randn(TOKENS, 3, 24), randn(TOKENS, 3, 24, seed=1)
    k[20, 1, 23] = v[30, 2, 0] = bad
    native.write(1, k, v, slots(16))
    keys, values = native.read(1, torch.tensor([TABLE]), torch.tensor([TOKENS]))
    for x, where in ((keys, [[1, 20]]), (values, [[2, 30]])):
        assert (~torch.isfinite(x[0]).all(-1)).nonzero().tolist() == where


def test_what_an_earlier_owner_left_never_shows() -> None:
    shape = shape_of(24)
    native = InterleavedInt8KvCache(shape, 5)
    stale = torch.full((TOKENS, 3, 24), torch.nan)
    native.write(1, stale, stale, slots(16))
    k, v = randn(6, 3, 24), randn(6, 3, 24, seed=1)
    native.write(1, k, v, slots(16)[:6])
    tables, lengths = torch.tensor([TABLE[:2], TABLE[1:3]]), torch.tensor([6, 0])
    keys, values = native.read(1, tables, lengths)
    for found, written in ((keys, k), (values, v)):
        assert torch.allclose(found[0, :, :6].transpose(0, 1), written, atol=0.02)
        assert not bool(found[0, :, 6:].any())
        assert not bool(found[1].any())


@pytest.mark.parametrize("head_dim", [1, 16, 24, 80])
def test_block_bytes_are_those_in_memory(head_dim: int) -> None:
    shape = shape_of(head_dim, 32)
    cache = InterleavedInt8KvCache(shape, 7)
    assert cache.nbytes == 7 * InterleavedInt8KvCache.block_bytes(shape)


def test_the_backend_and_the_blocks_choose_the_cache(caplog: pytest.LogCaptureFixture) -> None:
    assert cache_class("int8", "cpu", 16) is InterleavedInt8KvCache
    assert cache_class("int8", "torch", 16) is Int8KvCache
    assert cache_class("fp32", "cpu", 16) is Fp32KvCache
    assert not caplog.records
    assert cache_class("int8", "cpu", 24) is Int8KvCache
    assert "24 tokens are no multiple of 16" in caplog.text
    with pytest.raises(ModelLoadError, match="fp8"):
        cache_class("fp8", "cpu", 16)
