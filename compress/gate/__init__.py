"""The gate: whether an artefact is good enough to serve, judged with stated error rates.

``decision`` and ``verdict`` judge the figures of ``compress.measure``, ``judging`` has them
measured and keeps them, ``flow`` restores where that is not good enough. Policy has no tensors.
"""
