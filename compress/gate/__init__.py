"""The gate: whether an artefact is good enough to serve, judged with stated error rates.

``decision`` judges intervals, ``intervals`` and ``paired`` make them of paired scores, ``judging``
measures both models through the engine and caches what it found, ``flow`` restores where that is
not good enough. Policy has no tensors.
"""
