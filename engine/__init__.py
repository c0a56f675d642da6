"""The inference engine: scheduler, block manager, KV cache, layers, kernels, formats.

``import engine`` and ``engine.client`` are light; torch comes with ``engine.core`` and
what it uses. The core sees token ids only.
"""
