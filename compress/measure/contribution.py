"""What each decoder layer of an artefact costs: KL where it alone replaces the original's.

Layer by layer on an fp32 KV cache, so that two layers are in memory, and the hidden states of the
documents. Shape letters: B documents, L tokens, K hidden, V vocabulary.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from compress.measure.text import EvaluationText
from compress.progress import Progress
from engine.blocks import Blocks
from engine.formats.checkpoint import Checkpoint
from engine.formats.runtime import read_runtime

# Log-probabilities in memory at once.
_MOST = 1 << 25


@torch.inference_mode()
def contributions(
    original: Path, artefact: Path, text: EvaluationText, progress: Progress
) -> list[float]:
    """Nats per token for each decoder layer; infinite where it gives no numbers."""
    whole = Blocks.open(Checkpoint.open(original))
    runtime = read_runtime(artefact)
    changed = Blocks.open(Checkpoint.open(artefact), runtime.activations)
    layers = len(whole.spec.layers)
    sums, tokens = [0.0] * layers, 0
    parts = list(_parts(text, whole.spec.vocabulary_size))
    progress.phase("evaluating", f"what each of {layers} layers costs")
    start, done = time.perf_counter(), 0
    for ids_BL, real_BL in parts:
        hidden_BLK = whole.embed(ids_BL)
        log_p_BLV = _log_p(whole, _run(whole, hidden_BLK, 0))
        for index in range(layers):
            replaced_BLK = changed.run(changed.layer(index, {}), index, hidden_BLK.clone())
            log_q_BLV = _log_p(whole, _run(whole, replaced_BLK, index + 1))
            kl_BL = (log_p_BLV.exp() * (log_p_BLV - log_q_BLV)).sum(-1)
            sums[index] += float(kl_BL[real_BL].sum(dtype=torch.float64))
            hidden_BLK = whole.run(whole.layer(index, {}), index, hidden_BLK)
            done += 1
            each, items = (time.perf_counter() - start) / done, layers * len(parts)
            progress.layer(done, items, f"layer {index}", each * (items - done))
        tokens += int(real_BL.sum())
    return [value / tokens if math.isfinite(value) else math.inf for value in sums]


def _run(blocks: Blocks, hidden_BLK: Tensor, begin: int) -> Tensor:
    for index in range(begin, len(blocks.spec.layers)):
        hidden_BLK = blocks.run(blocks.layer(index, {}), index, hidden_BLK.clone())
    return hidden_BLK


def _log_p(blocks: Blocks, hidden_BLK: Tensor) -> Tensor:
    return blocks.logits(hidden_BLK).log_softmax(dim=-1)


def _parts(text: EvaluationText, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, where a next token is predicted), padded on the right, which nothing sees."""
    length = max(map(len, text.documents))
    size = max(1, _MOST // (length * vocabulary))
    for begin in range(0, len(text.documents), size):
        rows = text.documents[begin : begin + size]
        ids_BL = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
        lengths_B1 = torch.tensor([[len(row)] for row in rows])
        yield ids_BL, torch.arange(1, length + 1) < lengths_B1
