"""One decoder layer as one native call over the paged INT8 cache.

Made of the same phases as the single kernels, so that its results are bit-equal to those of the
composed layer on the ``cpu`` backend.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.cpu.grouped import PackedGroupedLinear
from engine.kernels.cpu.layer import Layer, LayerStep, Matrix
from engine.kernels.cpu.library import address, kernels
from engine.kernels.cpu.linear import PackedInt8Linear
from engine.kernels.cpu.memory import scratch
from engine.kernels.cpu.norm import FUNCTIONS
from engine.kernels.cpu.norm import Norm as NativeNorm
from engine.kernels.cpu.sparse import PackedSparseLinear
from engine.kv_cache import InterleavedInt8KvCache
from engine.layers.attention import Step, alibi_slopes
from engine.layers.decoder_layer import LayerFn, LayerWeights
from engine.layers.linear import Linear
from engine.layers.mlp import MlpWeights
from engine.layers.norm import Norm, WeightedNorm
from engine.models.spec import LayerSpec


@dataclass(frozen=True, slots=True)
class NativeLayer:
    """Keeps the weights alive that ``layer`` points to. ``index`` is its place in the cache."""

    layer: Layer
    rope: int | None
    index: int
    weights: LayerWeights
    slopes_H: Tensor | None

    @classmethod
    def make(
        cls, spec: LayerSpec, weights: LayerWeights, index: int, rope_dim: int
    ) -> "NativeLayer | None":
        """None where the layer has a part that has no fused form."""
        attention, mlp = weights.attention, weights.mlp
        if not isinstance(mlp, MlpWeights) or (spec.parallel and spec.residual_scale != 1.0):
            return None
        linears = {"qkv": attention.qkv, "o": attention.o, "up": mlp.up, "down": mlp.down}
        matrices = {name: _matrix(linear) for name, linear in linears.items()}
        if None in matrices.values():
            return None
        slopes_H = None if spec.alibi is None else alibi_slopes(spec.heads, spec.alibi)
        a, m = weights.attention_norms, weights.mlp_norms
        layer = Layer(
            attention_norm=_norm(a.norm),
            attention_out_norm=_norm(a.out_norm),
            attention_sum_norm=_norm(a.sum_norm),
            mlp_norm=_norm(m.norm),
            mlp_out_norm=_norm(m.out_norm),
            mlp_sum_norm=_norm(m.sum_norm),
            q_norm=_norm(attention.q_norm),
            k_norm=_norm(attention.k_norm),
            slopes=None if slopes_H is None else address(slopes_H),
            function=FUNCTIONS.index(spec.activation),
            gated=spec.gated,
            parallel=spec.parallel,
            heads=spec.heads,
            window=spec.window or 0,
            rope_dim=0 if spec.rope is None else rope_dim,
            scale=spec.head_dim**-0.5 if spec.scale is None else spec.scale,
            cap=spec.score_cap or 0.0,
            qkv_clip=spec.qkv_clip or 0.0,
            residual_scale=spec.residual_scale,
            **matrices,
        )
        return cls(layer, spec.rope, index, weights, slopes_H)

    def __call__(self, hidden_TK: Tensor, step: Step) -> Tensor:
        """Changes ``hidden_TK``, and returns it."""
        context, cache = step.context, step.cache
        assert isinstance(cache, InterleavedInt8KvCache)
        cosines, sines = (None, None) if self.rope is None else step.rotary[self.rope]
        args = LayerStep(
            layer=ctypes.addressof(self.layer),
            kv=cache.layers[self.index],
            hidden=address(hidden_TK),
            cosines=None if cosines is None else address(cosines),
            sines=None if sines is None else address(sines),
            slots=address(context.slots_T),
            sequences=address(context.sequences_B4),
            block_ids=address(context.block_ids_P),
            tokens=len(hidden_TK),
            sequence_count=len(context.sequences_B4),
            threads=torch.get_num_threads(),
        )
        native = kernels()
        native.layer_scratch(ctypes.byref(args))
        (args.scratch,) = scratch(args.scratch_bytes)
        native.layer(ctypes.byref(args))
        return hidden_TK


def _matrix(linear: Linear) -> Matrix | None:
    if isinstance(linear, PackedInt8Linear | PackedSparseLinear):
        return Matrix(int8=linear.weights)
    if isinstance(linear, PackedGroupedLinear) and linear.activations == "int8":
        return Matrix(grouped=linear.weights)
    return None


def _norm(norm: Norm) -> NativeNorm:
    if not isinstance(norm, WeightedNorm):
        return NativeNorm()
    bias = None if norm.bias_K is None else address(norm.bias_K)
    rms = norm.kind == "rms"
    return NativeNorm(address(norm.weight_K), bias, len(norm.weight_K), norm.eps, rms)


def by_cache(native: NativeLayer, composed: LayerFn) -> LayerFn:
    """``native`` where the cache has its layout, else ``composed``."""

    def layer(hidden_TK: Tensor, step: Step) -> Tensor:
        fits = isinstance(step.cache, InterleavedInt8KvCache)
        return native(hidden_TK, step) if fits else composed(hidden_TK, step)

    return layer
