"""Paged KV caches: dtype name -> class. A cache owns its layout; others know block ids."""

from engine.kv_cache.base import KvCache, KvShape
from engine.kv_cache.fp32 import Fp32KvCache
from engine.kv_cache.int8 import Int8KvCache
from engine.kv_cache.interleaved_int8 import InterleavedInt8KvCache

KV_CACHES: dict[str, type[KvCache]] = {"int8": Int8KvCache, "fp32": Fp32KvCache}

__all__ = ["KV_CACHES", "InterleavedInt8KvCache", "KvCache", "KvShape"]
