"""Builds a decoder from a Hugging Face folder, dense or compressed, layer by layer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import ModelLoadError
from engine.formats import int_quantized
from engine.formats.checkpoint import Checkpoint
from engine.formats.int_quantized import Int8Weight
from engine.formats.quant_config import checkpoint_format
from engine.formats.runtime import Runtime, read_runtime
from engine.layers.decoder_layer import LayerFn, LayerWeights, compose
from engine.layers.linear import Linear, Weight, make_fused, make_linear, quantize_int8
from engine.layers.rotary import Rotary
from engine.models import model_spec
from engine.models.decoder import Decoder
from engine.models.spec import LayerNames, ModelSpec
from engine.types import LayerReport

# Called with (layer, number of layers) after each layer.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A decoder, its linear layers, and what the folder said of itself."""

    decoder: Decoder
    linears: tuple[Linear, ...]
    layers: tuple[LayerReport, ...]
    runtime: Runtime
    format: str
    parameters: int


def load(folder: Path, backend: str, progress: Progress = lambda item, items: None) -> LoadedModel:
    """Raises ``ModelLoadError`` with one line on what is wrong with the folder."""
    checkpoint = Checkpoint.open(folder)
    spec = model_spec(folder, checkpoint.config)
    return _Loader(checkpoint, spec, backend).load(progress)


@dataclass(slots=True)
class _Loader:
    checkpoint: Checkpoint
    spec: ModelSpec
    backend: str
    linears: list[Linear] = field(default_factory=list)
    reports: list[LayerReport] = field(default_factory=list)
    parameters: int = 0

    def load(self, progress: Progress) -> LoadedModel:
        kind = checkpoint_format(self.checkpoint.config)
        runtime = read_runtime(self.checkpoint.folder)
        layers: list[LayerFn] = []
        for index, names in enumerate(self.spec.names):
            layers.append(compose(self.spec.layer, self._layer(names), index, self.backend))
            progress(index + 1, len(self.spec.names))
        embed, head = self._embedding_and_head(runtime)
        layer = self.spec.layer
        decoder = Decoder(
            spec=self.spec,
            embed=embed,
            rotary=Rotary(layer.head_dim, self.spec.context_length, self.spec.rope_theta),
            layers=tuple(layers),
            final_norm_K=self._vector(self.spec.final_norm),
            head=head,
            backend=self.backend,
        )
        linears, reports = tuple(self.linears), tuple(self.reports)
        return LoadedModel(decoder, linears, reports, runtime, kind, self.parameters)

    def _layer(self, names: LayerNames) -> LayerWeights:
        layer = self.spec.layer
        q_size, kv_size = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        hidden, mlp = layer.hidden_size, layer.mlp_size
        return LayerWeights(
            qkv=self._linear(
                (names.q, q_size, hidden), (names.k, kv_size, hidden), (names.v, kv_size, hidden)
            ),
            o=self._linear((names.o, hidden, q_size)),
            gate_up=self._linear((names.gate, mlp, hidden), (names.up, mlp, hidden)),
            down=self._linear((names.down, hidden, mlp)),
            attention_norm_K=self._vector(names.attention_norm),
            mlp_norm_K=self._vector(names.mlp_norm),
        )

    def _linear(self, *modules: tuple[str, int, int]) -> Linear:
        """One layer for modules (name, out-features, in-features) with the same input."""
        weights = [self._weight(*module) for module in modules]
        linear = make_fused(weights, self.backend)
        self.linears.append(linear)
        for (name, rows, columns), weight in zip(modules, weights, strict=True):
            self.parameters += rows * columns
            self._report(name, make_linear(weight, self.backend))
        return linear

    def _weight(self, name: str, rows: int, columns: int) -> Weight:
        weight = self.checkpoint.shaped(f"{name}.weight", rows, columns)
        if weight.dtype == torch.int8:
            scale = self.checkpoint.shaped(f"{name}.weight_scale", rows, 1)
            scale = self._floating(f"{name}.weight_scale", scale)
            return int_quantized.unpack({"weight": weight, "weight_scale": scale})
        return self._floating(f"{name}.weight", weight)

    def _vector(self, name: str) -> Tensor:
        weight = self.checkpoint.shaped(f"{name}.weight", self.spec.layer.hidden_size)
        self.parameters += weight.numel()
        return self._floating(f"{name}.weight", weight).float()

    def _floating(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            raise ModelLoadError(
                f"{self.checkpoint.folder}: {name} is {tensor.dtype}, which is not served"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ModelLoadError(f"{self.checkpoint.folder}: {name} has NaN or infinite values")
        return tensor

    def _embedding_and_head(self, runtime: Runtime) -> tuple[Callable[[Tensor], Tensor], Linear]:
        shape = (self.spec.vocabulary_size, self.spec.layer.hidden_size)
        name = f"{self.spec.embedding}.weight"
        table_VK = self._floating(name, self.checkpoint.shaped(name, *shape))
        head_VK: Tensor = table_VK
        if not self.spec.tied_head:
            name = f"{self.spec.head}.weight"
            head_VK = self._floating(name, self.checkpoint.shaped(name, *shape))
        weight: Weight = quantize_int8(head_VK) if runtime.head == "int8" else head_VK.float()
        head = make_linear(weight, self.backend)
        self.linears.append(head)
        self.parameters += table_VK.numel() + (0 if self.spec.tied_head else head_VK.numel())
        self._report(self.spec.head, head)
        if not self.spec.tied_head:
            return lambda ids: table_VK[ids].float(), head
        if isinstance(weight, Int8Weight):
            q_VK, scale_V1 = weight.q_NK, weight.scale_N[:, None]
            return lambda ids: q_VK[ids].float() * scale_V1[ids], head
        dense_VK = weight
        return lambda ids: dense_VK[ids], head

    def _report(self, name: str, linear: Linear) -> None:
        self.reports.append(
            LayerReport(
                name=name,
                storage=linear.storage,
                execution=linear.execution,
                bytes=linear.nbytes,
            )
        )
