"""Moves scales of a block's inputs into what comes before them, so that nothing runs slower.

A norm's weight, or the rows of the linear before, are divided; the linears that read it are
multiplied. Shape letters: N out-features, K in-features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.methods.inputs import LayerInputs
from engine.models.spec import LayerNames, LayerSpec, Matrix

Read = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class ScalePlace:
    """Linears that read one input, and what makes it: a norm, or the rows of a linear.

    ``heads``: (KV heads, head_dim) where heads share what the rows make; None: one to one.
    """

    readers: tuple[str, ...]
    norm: str | None = None
    producer: str | None = None
    heads: tuple[int, int] | None = None

    def tie(self, values_K: Tensor) -> Tensor:
        """[K]: the mean of those values that one row stands behind."""
        if self.heads is None:
            return values_K
        values_HRD = self._by_row(values_K, self.heads)
        return values_HRD.mean(1, keepdim=True).expand_as(values_HRD).flatten()

    def rows(self, scale_K: Tensor) -> Tensor:
        """[N] of the producer, from what ``tie`` made equal."""
        return scale_K if self.heads is None else self._by_row(scale_K, self.heads)[:, 0].flatten()

    @staticmethod
    def _by_row(values_K: Tensor, heads: tuple[int, int]) -> Tensor:
        return values_K.view(heads[0], -1, heads[1])


def norm_places(names: LayerNames) -> list[ScalePlace]:
    """Norms of which all readers are linears that may be compressed."""
    readers: dict[str, list[str]] = {}
    if names.attention_norm is not None:
        readers[names.attention_norm] = list(names.qkv.modules)
    if names.mlp_norm is not None and names.router is None:
        readers.setdefault(names.mlp_norm, []).extend(names.mlps[0].up.modules)
    return [ScalePlace(tuple(modules), norm=norm) for norm, modules in readers.items()]


def linear_places(layer: LayerSpec, names: LayerNames) -> list[ScalePlace]:
    """Linears whose out-features another reads as they are: v for o, up for down."""
    places = []
    if layer.qkv_clip is None and _separate(names.qkv, 3):
        heads = None if layer.heads == layer.kv_heads else (layer.kv_heads, layer.head_dim)
        places.append(ScalePlace(names.o.modules, producer=names.qkv.modules[2], heads=heads))
    for mlp in names.mlps:
        if layer.gated and _separate(mlp.up, 2):
            places.append(ScalePlace(mlp.down.modules, producer=mlp.up.modules[1]))
    return places


def _separate(matrix: Matrix, parts: int) -> bool:
    return len(matrix.modules) == parts and not matrix.bias and not matrix.transposed


class Scaled:
    """A block's weights with the scales that were folded into them so far."""

    def __init__(self, read: Read, layer: LayerSpec) -> None:
        """``read`` gives tensors by name; linears as [N, K]."""
        self._read = read
        self._layer = layer
        self._columns: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}
        self.vectors: dict[str, Tensor] = {}

    def weight(self, module: str) -> Tensor:
        """[N, K]: as it is stored, or float32 where it was scaled."""
        weight_NK = self._read(f"{module}.weight")
        if module in self._rows:
            weight_NK = weight_NK.float() / self._rows[module][:, None]
        if module in self._columns:
            weight_NK = weight_NK.float() * self._columns[module]
        return weight_NK

    def changed(self, module: str) -> bool:
        """Whether a scale touches this linear."""
        return module in self._rows or module in self._columns

    def inputs(self, modules: tuple[str, ...], inputs: LayerInputs) -> LayerInputs:
        """What linears that share ``inputs`` read now."""
        scale_K = self._columns.get(modules[0])
        return inputs if scale_K is None else inputs.scaled(scale_K)

    def fold(self, place: ScalePlace, scale_K: Tensor) -> None:
        """Divides the input of ``place`` by ``scale_K``, or as nearly as its norm's dtype can."""
        if bool((scale_K == 1).all()):
            return
        if place.norm is not None:
            scale_K = self._fold_norm(place.norm, scale_K)
        else:
            assert place.producer is not None
            self._rows[place.producer] = place.rows(scale_K)
        self._columns |= dict.fromkeys(place.readers, scale_K)

    def _fold_norm(self, norm: str, scale_K: Tensor) -> Tensor:
        """The scale that the rounded norm really has: what linears must make up for."""
        offset, name = self._layer.norm.offset, f"{norm}.weight"
        weight_K = self._read(name)
        folded_K = ((weight_K.float() + offset) / scale_K - offset).to(weight_K.dtype)
        before_K, after_K = weight_K.float() + offset, folded_K.float() + offset
        usable_K = (before_K != 0) & (after_K != 0)
        self.vectors[name] = torch.where(usable_K, folded_K, weight_K)
        exact_K = torch.where(usable_K, before_K / after_K, 1.0)
        if self._layer.norm.bias:
            bias_K = self._read(f"{norm}.bias")
            self.vectors[f"{norm}.bias"] = (bias_K.float() / exact_K).to(bias_K.dtype)
        return exact_K


def all_within(place: ScalePlace, targets: Mapping[str, object]) -> bool:
    """Whether nothing that must stay as it is would be scaled."""
    touched = (*place.readers, *((place.producer,) if place.producer is not None else ()))
    return all(module in targets for module in touched)
