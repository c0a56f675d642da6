"""A model layer by layer, for those who change its weights on the way: one layer in memory.

The layers are those that serve; keys and values are float32 and live for one call.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.batch import AttentionGroup, ForwardContext
from engine.errors import ModelLoadError
from engine.formats.checkpoint import Checkpoint
from engine.kv_cache import KvShape
from engine.kv_cache.fp32 import Fp32KvCache
from engine.layers.attention import Step
from engine.layers.decoder_layer import LayerFn
from engine.layers.embedding import Embedding, finish_logits
from engine.layers.linear import Linear, Wrapped
from engine.layers.rotary import Rotary
from engine.loader import DecoderLoader
from engine.models import model_spec
from engine.models.spec import LayerNames, Matrix, ModelSpec
from engine.weights import WeightReader

# Rows of the head that are in memory at once.
_HEAD_ROWS = 8192
# (modules that share the input, the input [M, K]).
Observe = Callable[[tuple[str, ...], Tensor], None]


@dataclass(frozen=True, slots=True)
class Blocks:
    """The layers of a checkpoint, and its two ends. Sequences are batches of ids [B, L].

    ``activations`` is for packed weights, as in ``WeightReader``.
    """

    checkpoint: Checkpoint
    spec: ModelSpec
    backend: str = "torch"
    activations: str = "float"
    _rotary: tuple[Rotary, ...] = field(default=())

    @classmethod
    def open(cls, checkpoint: Checkpoint, activations: str = "float") -> "Blocks":
        """Raises ``ModelLoadError`` where config and weights do not fit."""
        spec = model_spec(checkpoint.folder, checkpoint.config, checkpoint.tensors)
        rotary = tuple(Rotary(rope, spec.context_length) for rope in spec.ropes)
        return cls(checkpoint, spec, activations=activations, _rotary=rotary)

    @torch.inference_mode()
    def embed(self, ids_BL: Tensor) -> Tensor:
        """float32 [B, L, K]: what the first layer reads."""
        table = f"{self.spec.embedding}.weight"
        embed = Embedding(
            lookup=lambda ids_T: self._rows(table, ids_T),
            scale=self.spec.embedding_scale,
            positions_SK=self._loader({}).positions(),
        )
        positions_T = torch.arange(ids_BL.shape[1]).repeat(len(ids_BL))
        return embed(ids_BL.flatten(), positions_T).view(*ids_BL.shape, -1)

    def layer(
        self, index: int, changed: Mapping[str, Tensor], observe: Observe | None = None
    ) -> LayerFn:
        """Layer ``index`` with the tensors ``changed``; ``observe`` sees its linears' inputs.

        With ``observe``, what the MLP gives is 0: nobody reads it, so it is not computed.
        """
        loader = self._loader(changed, observe, self.spec.names[index])
        return loader.layer(self.spec.layers[index], self.spec.names[index], 0)

    @torch.inference_mode()
    def run(self, layer: LayerFn, index: int, hidden_BLK: Tensor) -> Tensor:
        """What layer ``index`` makes of the hidden states of whole sequences, [B, L, K]."""
        count, length, _ = hidden_BLK.shape
        positions_T = torch.arange(length).repeat(count)
        group = AttentionGroup(
            0, count, length, torch.arange(count)[:, None], torch.full((count,), length)
        )
        sequences = [(index * length, length, length, index) for index in range(count)]
        context = ForwardContext(
            positions_T=positions_T,
            slots_T=torch.arange(count * length),
            groups=[group],
            sequences_B4=torch.tensor(sequences, dtype=torch.int32),
            block_ids_P=torch.arange(count, dtype=torch.int32),
        )
        spec = self.spec.layers[index]
        shape = KvShape(layers=1, kv_heads=spec.kv_heads, head_dim=spec.head_dim, block_size=length)
        tables = tuple(rotary.tables(positions_T) for rotary in self._rotary)
        step = Step(context, Fp32KvCache(shape, count), tables)
        return layer(hidden_BLK.flatten(0, 1), step).view(hidden_BLK.shape)

    @torch.inference_mode()
    def logits(self, hidden_BLK: Tensor) -> Tensor:
        """float32 [B, L, V] of what the last layer gave. The head is read part by part."""
        spec, one = self.spec, self.spec.layer
        norm = self._loader({}).reader.norm(spec.final_norm, one.hidden_size, one.norm)
        normed_TK = norm(hidden_BLK.flatten(0, 1))
        name = f"{spec.embedding if spec.tied_head else spec.head}.weight"
        parts = [
            normed_TK @ self._rows(name, slice(first, first + _HEAD_ROWS)).t()
            for first in range(0, spec.vocabulary_size, _HEAD_ROWS)
        ]
        logits_TV = finish_logits(torch.cat(parts, dim=1), spec)
        return logits_TV.view(*hidden_BLK.shape[:2], -1)

    def _rows(self, name: str, rows: Tensor | slice) -> Tensor:
        found = self.checkpoint.rows(name, rows).float()
        if not bool(found.isfinite().all()):
            raise ModelLoadError(f"{self.checkpoint.folder}: {name} has NaN or infinite values")
        return found

    def _loader(
        self,
        changed: Mapping[str, Tensor],
        observe: Observe | None = None,
        names: LayerNames | None = None,
    ) -> DecoderLoader:
        reader = WeightReader(self.checkpoint, self.backend, changed)
        reader.activations = self.activations
        if observe is not None and names is not None:
            reader = _ObservingReader(self.checkpoint, self.backend, changed)
            reader.observe = observe
            reader.last = {mlp.down.modules for mlp in names.mlps}
        return DecoderLoader(reader, self.spec, self.backend)


class _ObservingReader(WeightReader):
    observe: Observe
    last: set[tuple[str, ...]]

    def matrix(self, matrix: Matrix, sizes: tuple[int, ...], columns: int) -> Linear:
        linear = super().matrix(matrix, sizes, columns)
        zeros = sum(sizes) if matrix.modules in self.last else 0
        return _Observed(linear, matrix.modules, self.observe, zeros)


@dataclass(frozen=True, slots=True)
class _Observed(Wrapped):
    """``zeros``: out-features that are 0 instead of computed; 0 computes them."""

    modules: tuple[str, ...]
    observe: Observe
    zeros: int

    def __call__(self, x_MK: Tensor) -> Tensor:
        self.observe(self.modules, x_MK)
        return x_MK.new_zeros(len(x_MK), self.zeros) if self.zeros else self.linear(x_MK)
