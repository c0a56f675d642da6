"""Paged KV caches. A cache owns its layout; others know block ids."""

from engine.errors import ModelLoadError
from engine.kv_cache.base import KvCache, KvShape
from engine.kv_cache.fp32 import Fp32KvCache
from engine.kv_cache.int8 import Int8KvCache
from engine.kv_cache.interleaved_int8 import InterleavedInt8KvCache

CACHES: dict[str, type[KvCache]] = {"int8": Int8KvCache, "fp32": Fp32KvCache}


def cache_class(dtype: str, backend: str, block_size: int) -> type[KvCache]:
    """The cache that ``backend`` is fastest with. Raises ``ModelLoadError``."""
    if dtype not in CACHES:
        raise ModelLoadError(f"KV cache dtype {dtype!r} is unknown; known: {', '.join(CACHES)}")
    if dtype == "int8" and backend == "cpu" and InterleavedInt8KvCache.takes(block_size):
        return InterleavedInt8KvCache
    return CACHES[dtype]


__all__ = ["CACHES", "InterleavedInt8KvCache", "KvCache", "KvShape", "cache_class"]
