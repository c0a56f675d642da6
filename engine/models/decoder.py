"""The decoder that all families share: embedding, layers, final norm, head."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from engine.batch import ModelInputs
from engine.kernels import kernel
from engine.kv_cache import KvCache
from engine.layers.decoder_layer import LayerFn, Step
from engine.layers.linear import Linear
from engine.layers.rotary import Rotary
from engine.models.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A loaded model. ``embed`` maps token ids [T] to float32 [T, K]."""

    spec: ModelSpec
    embed: Callable[[Tensor], Tensor]
    rotary: Rotary
    layers: tuple[LayerFn, ...]
    final_norm_K: Tensor
    head: Linear
    backend: str

    def forward(self, inputs: ModelInputs, cache: KvCache) -> Tensor:
        """float32 logits [R, V] of ``inputs.rows_R``; writes the step's KV into ``cache``."""
        cos, sin = self.rotary.tables(inputs.context.positions_T)
        step = Step(inputs.context, cache, cos, sin)
        hidden = self.embed(inputs.token_ids_T)
        for layer in self.layers:
            hidden = layer(hidden, step)
        norm = kernel("rms_norm", self.backend)
        rows = hidden[inputs.rows_R]
        return self.head(norm(rows, self.final_norm_K, self.spec.layer.norm_eps))
