"""The gate: whether an artefact is good enough to serve, judged with stated error rates.

``decision`` judges intervals, ``intervals`` and ``paired`` make them of paired scores, ``runner``
scores both models through the engine, ``flow`` caches verdicts. Policy has no tensors.
"""
