"""The decoder that all families share: embedding, layers, final norm, head."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from engine.batch import ModelInputs
from engine.kv_cache import KvCache
from engine.layers.attention import Step
from engine.layers.decoder_layer import LayerFn, Observe
from engine.layers.embedding import Embedding, finish_logits
from engine.layers.linear import Linear
from engine.layers.norm import Norm
from engine.layers.rotary import Rotary
from engine.models.spec import ModelSpec

# As ``Observe``, with the layer's index first.
ObserveLayer = Callable[[int, Linear, Tensor], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A loaded model. ``observable`` makes a layer whose linear layers' inputs are seen: slower,
    with results of the same bits."""

    spec: ModelSpec
    embed: Embedding
    rotary: tuple[Rotary, ...]
    layers: tuple[LayerFn, ...]
    observable: tuple[Callable[[Observe], LayerFn], ...]
    final_norm: Norm
    head: Linear

    def forward(self, inputs: ModelInputs, cache: KvCache) -> Tensor:
        """float32 logits [R, V] of ``inputs.rows_R``; writes the step's KV into ``cache``."""
        return self.logits(self.hidden(inputs, cache)[inputs.rows_R])

    def hidden(
        self, inputs: ModelInputs, cache: KvCache, observe: ObserveLayer | None = None
    ) -> Tensor:
        """float32 [T, K] after the last layer; writes the step's KV into ``cache``.

        ``observe`` sees what the layers' linear layers read.
        """
        layers = self.layers
        if observe is not None:
            makers = enumerate(self.observable)
            layers = tuple(make(partial(observe, index)) for index, make in makers)
        positions_T = inputs.context.positions_T
        tables = tuple(rotary.tables(positions_T) for rotary in self.rotary)
        step = Step(inputs.context, cache, tables)
        hidden = self.embed(inputs.token_ids_T, positions_T)
        for layer in layers:
            hidden = layer(hidden, step)
        return hidden

    def logits(self, hidden_RK: Tensor) -> Tensor:
        """float32 logits [R, V] of rows of ``hidden``."""
        return finish_logits(self.head(self.final_norm(hidden_RK)), self.spec)
