"""Paged KV caches. A cache owns its layout; others know block ids."""

import logging

from engine.errors import ModelLoadError
from engine.kv_cache.base import KvCache, KvShape
from engine.kv_cache.fp32 import Fp32KvCache
from engine.kv_cache.int8 import Int8KvCache
from engine.kv_cache.interleaved_int8 import InterleavedInt8KvCache

logger = logging.getLogger(__name__)

CACHES: dict[str, type[KvCache]] = {"int8": Int8KvCache, "fp32": Fp32KvCache}


def cache_class(dtype: str, backend: str, block_size: int) -> type[KvCache]:
    """The cache that ``backend`` is fastest with. Raises ``ModelLoadError``."""
    if dtype not in CACHES:
        raise ModelLoadError(f"KV cache dtype {dtype!r} is unknown; known: {', '.join(CACHES)}")
    if (dtype, backend) != ("int8", "cpu"):
        return CACHES[dtype]
    if InterleavedInt8KvCache.takes(block_size):
        return InterleavedInt8KvCache
    logger.warning("blocks of %d tokens are no multiple of 16: attention is torch's", block_size)
    return CACHES[dtype]


__all__ = ["CACHES", "InterleavedInt8KvCache", "KvCache", "KvShape", "cache_class"]
