"""OWL (arXiv 2310.05175): decoder layers with more outliers among their scores are pruned less.

A score is Wanda's, |W| * |x|; an outlier is above ``_OUTLIER`` times the layer's mean score.
The shares that layers keep lie in a range of ``OWL_SHIFT``, twice the paper's lambda of 0.08.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.methods import OWL_SHIFT

_OUTLIER = 5.0


def outlier_share(weights: Sequence[Tensor], norms: Sequence[Tensor]) -> float:
    """The share of a layer's weights whose score is an outlier.

    ``weights`` [N, K] with the norms [K] of what they read.
    """
    pairs = zip(weights, norms, strict=True)
    scores = torch.cat([(w_NK.float().abs() * norm_K).flatten() for w_NK, norm_K in pairs])
    return float((scores > _OUTLIER * scores.mean()).double().mean())


def allocate(outliers: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[float]:
    """Each layer's sparsity, by its share of outliers; over all weights it is ``sparsity``.

    ``sizes`` are numbers of weights. Layers with equal shares have equal sparsities.
    """
    low, high = min(outliers), max(outliers)
    if low == high:
        return [sparsity] * len(outliers)
    kept = [OWL_SHIFT * (share - low) / (high - low) for share in outliers]
    mean = sum(k * n for k, n in zip(kept, sizes, strict=True)) / sum(sizes)
    return [sparsity - (k - mean) for k in kept]
