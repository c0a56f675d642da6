"""Builds a decoder from a Hugging Face folder, dense or compressed, layer by layer."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from engine.errors import ModelLoadError
from engine.formats.checkpoint import Checkpoint
from engine.formats.quant_config import checkpoint_format, packed_scheme
from engine.formats.runtime import Runtime, read_runtime
from engine.kernels.cpu.linear import PackedInt8Linear
from engine.kernels.cpu.memory import give_back
from engine.layers.attention import AttentionWeights
from engine.layers.decoder_layer import Branch, LayerFn, LayerWeights, Observe, compose
from engine.layers.embedding import Embedding
from engine.layers.linear import DenseLinear, Int8Linear, Linear
from engine.layers.mlp import ExpertsWeights, MlpWeights
from engine.layers.native_layer import NativeLayer, by_cache
from engine.layers.rotary import Rotary
from engine.layers.weight import quantize_int8
from engine.models import model_spec
from engine.models.decoder import Decoder
from engine.models.spec import LayerNames, LayerSpec, Matrix, MlpNames, ModelSpec
from engine.types import LayerReport
from engine.weights import WeightReader

# Called with (layer, number of layers) after each layer.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A decoder, its linear layers, and what the folder said of itself.

    ``sparse``: what was measured of its sparse layers, see ``SpeedGate``.
    """

    decoder: Decoder
    linears: tuple[Linear, ...]
    layers: tuple[LayerReport, ...]
    runtime: Runtime
    format: str
    parameters: int
    sparse: tuple[str, ...]


def load(
    folder: Path,
    backend: str,
    progress: Progress = lambda item, items: None,
    *,
    allow_slow: bool = False,
    int8_weights: bool = False,
) -> LoadedModel:
    """Raises ``ModelLoadError`` with one line on what is wrong with the folder.

    ``allow_slow`` and ``int8_weights`` are those of ``KernelConfig``.
    """
    checkpoint = Checkpoint.open(folder)
    spec = model_spec(folder, checkpoint.config, checkpoint.tensors)
    scheme, runtime = packed_scheme(checkpoint.config), read_runtime(folder)
    runtime = replace(runtime, head="int8") if int8_weights else runtime
    kind = checkpoint_format(checkpoint.config) if scheme is None else scheme.format
    if not allow_slow and any(info.dtype == "F8_E4M3" for info in checkpoint.tensors.values()):
        raise ModelLoadError(
            f"{folder}: FP8 has no fast kernel on this machine: "
            "serve it with --allow-slow, or another recipe, such as w8a8"
        )
    reader = WeightReader(checkpoint, backend)
    reader.activations, reader.scheme = runtime.activations, scheme
    reader.int8_weights = int8_weights
    decoder = DecoderLoader(reader, spec, backend).decoder(runtime, progress)
    reader.check_all_read(unused=spec.head)
    return LoadedModel(
        decoder, tuple(reader.linears), tuple(reader.reports), runtime, kind, reader.parameters,
        reader.gate.verdicts,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class DecoderLoader:
    """Makes a decoder, or single layers and its two ends, of what a reader reads."""

    reader: WeightReader
    spec: ModelSpec
    backend: str

    def decoder(self, runtime: Runtime, progress: Progress) -> Decoder:
        """All of it; ``progress`` is told of each layer."""
        spec, layers = self.spec, list[LayerFn]()
        observable: list[Callable[[Observe], LayerFn]] = []
        for index, (layer, names) in enumerate(zip(spec.layers, spec.names, strict=True)):
            weights = self._weights(layer, names)
            layers.append(self._fastest(layer, weights, index))
            observable.append(partial(self._observed, layer, weights, index))
            give_back()
            progress(len(layers), len(spec.layers))
        return replace(self.ends(runtime), layers=tuple(layers), observable=tuple(observable))

    def ends(self, runtime: Runtime) -> Decoder:
        """Embedding, final norm and head, with no layers between."""
        spec = self.spec
        lookup, head = self._lookup_and_head(runtime)
        embed = Embedding(lookup=lookup, scale=spec.embedding_scale, positions_SK=self.positions())
        return Decoder(
            spec=spec,
            embed=embed,
            rotary=tuple(Rotary(rope, spec.context_length) for rope in spec.ropes),
            layers=(),
            observable=(),
            final_norm=self.reader.norm(spec.final_norm, spec.layer.hidden_size, spec.layer.norm),
            head=head,
        )

    def layer(self, layer: LayerSpec, names: LayerNames, index: int) -> LayerFn:
        """One layer, which has the place ``index`` in the KV cache."""
        return self._fastest(layer, self._weights(layer, names), index)

    def _weights(self, layer: LayerSpec, names: LayerNames) -> LayerWeights:
        def branch(*places: str | None) -> Branch:
            norms = (self.reader.norm(name, layer.hidden_size, layer.norm) for name in places)
            return Branch(*norms)

        return LayerWeights(
            attention=self._attention(layer, names),
            attention_norms=branch(
                names.attention_norm, names.attention_out_norm, names.attention_sum_norm
            ),
            mlp=self._mlp(layer, names),
            mlp_norms=branch(names.mlp_norm, names.mlp_out_norm, names.mlp_sum_norm),
        )

    def _fastest(self, layer: LayerSpec, weights: LayerWeights, index: int) -> LayerFn:
        turned = self._turned(layer)
        composed = compose(layer, weights, index, turned, self.backend)
        if self.backend != "cpu":
            return composed
        native = NativeLayer.make(layer, weights, index, turned)
        return composed if native is None else by_cache(native, composed)

    def _observed(
        self, layer: LayerSpec, weights: LayerWeights, index: int, observe: Observe
    ) -> LayerFn:
        seen, turned = weights.observed(observe), self._turned(layer)
        return compose(layer, seen, index, turned, self.backend)

    def _turned(self, layer: LayerSpec) -> int:
        """Features of a head that its rope turns."""
        return layer.head_dim if layer.rope is None else self.spec.ropes[layer.rope].dim

    def _attention(self, layer: LayerSpec, names: LayerNames) -> AttentionWeights:
        hidden, dim = layer.hidden_size, layer.head_dim
        q_size, kv_size = layer.heads * dim, layer.kv_heads * dim
        normed = (dim, dim) if layer.qk_norm == "head" else (q_size, kv_size)
        return AttentionWeights(
            qkv=self.reader.matrix(names.qkv, (q_size, kv_size, kv_size), hidden),
            o=self.reader.matrix(names.o, (hidden,), q_size),
            q_norm=self.reader.norm(names.q_norm, normed[0], layer.norm),
            k_norm=self.reader.norm(names.k_norm, normed[1], layer.norm),
        )

    def _mlp(self, layer: LayerSpec, names: LayerNames) -> MlpWeights | ExpertsWeights:
        mlps = tuple(self._one_mlp(layer, one) for one in names.mlps)
        if layer.experts is None or names.router is None:
            return mlps[0]
        router = Matrix(modules=(names.router,), router=True)
        gate = self.reader.matrix(router, (layer.experts.count,), layer.hidden_size)
        return ExpertsWeights(router=gate, experts=mlps)

    def _one_mlp(self, layer: LayerSpec, names: MlpNames) -> MlpWeights:
        size, hidden = layer.mlp_size, layer.hidden_size
        up = self.reader.matrix(names.up, (size, size) if layer.gated else (size,), hidden)
        return MlpWeights(up=up, down=self.reader.matrix(names.down, (hidden,), size))

    def positions(self) -> Tensor | None:
        """float32 [S, K], learned, of a model that has them."""
        spec = self.spec
        if spec.positions is None:
            return None
        rows = spec.context_length + spec.position_offset
        name = f"{spec.positions}.weight"
        table_SK = self.reader.floating(name, rows, spec.layer.hidden_size).float()
        return table_SK[spec.position_offset :]

    def _lookup_and_head(self, runtime: Runtime) -> tuple[Callable[[Tensor], Tensor], Linear]:
        spec = self.spec
        shape = (spec.vocabulary_size, spec.layer.hidden_size)
        table_VK = self.reader.floating(f"{spec.embedding}.weight", *shape)
        head_VK = table_VK
        if not spec.tied_head:
            head_VK = self.reader.floating(f"{spec.head}.weight", *shape)
        give_back()  # what checking these took: they are the largest
        quantised = runtime.head == "int8"
        weight = quantize_int8(head_VK) if quantised else head_VK.float()
        head = self.reader.head(spec.head, weight)
        if not spec.tied_head:
            return lambda ids: table_VK[ids].float(), head
        if isinstance(head, DenseLinear):
            dense_VK = head.weight_NK
            return lambda ids: dense_VK[ids], head
        assert isinstance(head, Int8Linear | PackedInt8Linear)
        rows = head.rows
        return lambda ids: rows(ids).dequantize(), head
