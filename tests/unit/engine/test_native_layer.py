"""A layer as one native call: bit-equal to the same kernels one by one."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count

import pytest
import torch
from torch import Tensor

from engine import batch as batches
from engine.formats.grouped import GroupedWeight
from engine.formats.int_quantized import Int8Weight
from engine.kernels.cpu.library import supported
from engine.kv_cache import InterleavedInt8KvCache, KvShape
from engine.layers.attention import AttentionWeights, Step
from engine.layers.decoder_layer import Branch, LayerFn, LayerWeights, compose
from engine.layers.linear import Linear, make_linear
from engine.layers.mlp import MlpWeights
from engine.layers.native_layer import NativeLayer
from engine.layers.norm import Norm, identity, make_norm
from engine.layers.rotary import Rotary
from engine.layers.weight import SparseWeight
from engine.models.spec import LayerSpec, NormSpec, RopeSpec
from engine.types import (
    Request,
    SamplingParams,
    ScheduledBatch,
    ScheduledSequence,
    Sequence,
    StoppingParams,
)

PLAIN = LayerSpec(
    hidden_size=48,
    heads=4,
    kv_heads=2,
    head_dim=24,
    mlp_size=100,
    norm=NormSpec(eps=1e-5),
    rope=0,
)
LAYERS = {
    "llama": PLAIN,
    "one head": replace(PLAIN, heads=1, kv_heads=1, head_dim=8, hidden_size=33, mlp_size=7),
    "window and cap": replace(PLAIN, window=5, score_cap=20.0, scale=0.3),
    "no positions": replace(PLAIN, rope=None),
    "alibi": replace(PLAIN, rope=None, alibi=8.0, qkv_clip=0.9),
    "gelu, plain": replace(PLAIN, gated=False, activation="gelu"),
    "relu": replace(PLAIN, activation="relu"),
    "gelu_tanh": replace(PLAIN, activation="gelu_tanh", residual_scale=0.22),
    "qk-norm of heads": replace(PLAIN, qk_norm="head"),
    "qk-norm of all": replace(PLAIN, qk_norm="all", kv_heads=4),
    "parallel": replace(PLAIN, parallel=True),
    "layer norm": replace(PLAIN, norm=NormSpec(eps=1e-6, kind="layer", bias=True)),
    "partial rotary": PLAIN,
}
# Norms of a branch: of what it reads, of what it gives, of the sum.
NORMS = [(True, False, False), (True, True, False), (False, True, False), (False, False, True)]
BLOCK = 16


class Weights:
    """Random ones, of odd sizes; ``make`` makes the matrices."""

    def __init__(self, seed: int, make: Callable[[Tensor, Tensor | None], Linear]) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._make = make

    def randn(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self._generator)

    def matrix(self, outs: int, ins: int, bias: bool) -> Linear:
        return self._make(self.randn(outs, ins) * ins**-0.5, self.randn(outs) if bias else None)

    def norm(self, there: bool, size: int, spec: NormSpec) -> Norm:
        if not there:
            return identity
        bias_K = self.randn(size) if spec.bias else None
        return make_norm(spec, 1 + 0.1 * self.randn(size), bias_K, "cpu")

    def layer(self, spec: LayerSpec, norms: tuple[bool, bool, bool], bias: bool) -> LayerWeights:
        hidden, q = spec.hidden_size, spec.heads * spec.head_dim
        kv = spec.kv_heads * spec.head_dim
        sizes = (spec.head_dim, spec.head_dim) if spec.qk_norm == "head" else (q, kv)
        there = spec.qk_norm is not None
        branches = [Branch(*(self.norm(n, hidden, spec.norm) for n in norms)) for _ in range(2)]
        return LayerWeights(
            attention=AttentionWeights(
                qkv=self.matrix(q + 2 * kv, hidden, bias),
                o=self.matrix(hidden, q, bias),
                q_norm=self.norm(there, sizes[0], spec.norm),
                k_norm=self.norm(there, sizes[1], spec.norm),
            ),
            attention_norms=branches[0],
            mlp=MlpWeights(
                up=self.matrix(spec.mlp_size * (1 + spec.gated), hidden, bias),
                down=self.matrix(hidden, spec.mlp_size, bias),
            ),
            mlp_norms=branches[1],
        )


def int8(weight_NK: Tensor, bias_N: Tensor | None) -> Linear:
    scale_N = weight_NK.abs().amax(1) / 127
    q_NK = (weight_NK / scale_N[:, None]).round().to(torch.int8)
    return make_linear(Int8Weight(q_NK, scale_N), "cpu", bias_N)


def sparse(weight_NK: Tensor, bias_N: Tensor | None) -> Linear:
    """Every third weight is 0."""
    scale_N = weight_NK.abs().amax(1) / 127
    q_NK = (weight_NK / scale_N[:, None]).round().to(torch.int8)
    q_NK.flatten()[::3] = 0
    return make_linear(SparseWeight(Int8Weight(q_NK, scale_N)), "cpu", bias_N)


def int4(weight_NK: Tensor, bias_N: Tensor | None) -> Linear:
    columns = weight_NK.shape[1]
    scale_NG = weight_NK.abs().amax(1, keepdim=True).repeat(1, -(-columns // 32)) / 7
    q_NK = (weight_NK / scale_NG[:, :1]).round().to(torch.int8)
    return make_linear(GroupedWeight(q_NK, scale_NG, None, 32), "cpu", bias_N)


def traffic(seed: int) -> list[ScheduledBatch]:
    """Steps of three sequences: chunks of prompts beside decodes, with shuffled blocks."""
    blocks, arrivals = iter(torch.randperm(64).tolist()), count()
    sequences = []
    for prompt in (37, 5, 300):
        request = Request(
            id=str(prompt),
            prompt=[1] * prompt,
            sampling=SamplingParams(),
            stopping=StoppingParams(max_tokens=9),
            arrival=float(next(arrivals)),
        )
        table = [next(blocks) for _ in range(-(-(prompt + 9) // BLOCK))]
        sequences.append(Sequence(request, [1] * (prompt + 9), block_table=table))
    steps = [(37, 5, 30), (1, 1, 64), (1, 2, 190), (1, 1, 16), (1, 0, 1), (0, 0, 3)]
    batches_ = []
    for lengths in steps:
        pairs = zip(sequences, lengths, strict=True)
        batches_.append(ScheduledBatch([ScheduledSequence(s, n) for s, n in pairs if n]))
    return batches_


def outputs(layer: LayerFn, spec: LayerSpec, rope_dim: int) -> list[Tensor]:
    """What the layer makes of each step, from the same random hidden states."""
    torch.manual_seed(3)
    shape = KvShape(layers=1, kv_heads=spec.kv_heads, head_dim=spec.head_dim, block_size=BLOCK)
    cache, rotary = (
        InterleavedInt8KvCache(shape, 64),
        Rotary(RopeSpec(dim=rope_dim, theta=100.0), 512),
    )
    found = []
    for batch in traffic(1):
        context = batches.build(batch, BLOCK).context
        step = Step(context, cache, (rotary.tables(context.positions_T),))
        hidden_TK = torch.randn(len(context.positions_T), spec.hidden_size)
        found.append(layer(hidden_TK, step).clone())
        for item in batch.items:
            item.sequence.computed += item.length
    return found


def assert_bit_equal(name: str, norms: tuple[bool, bool, bool], threads: tuple[int, ...]) -> None:
    """The native layer's outputs are those of its kernels one by one."""
    spec = LAYERS[name]
    if spec.parallel:
        norms = (True, False, False)  # what families with parallel branches have
    rope_dim = 8 if name in ("partial rotary", "one head") else spec.head_dim
    for seed, (make, bias) in enumerate(
        ((int8, False), (int8, True), (int4, False), (sparse, True))
    ):
        weights = Weights(seed, make).layer(spec, norms, bias)
        native = NativeLayer.make(spec, weights, 0, rope_dim)
        assert native is not None
        wanted = outputs(compose(spec, weights, 0, rope_dim, "cpu"), spec, rope_dim)
        before = torch.get_num_threads()
        try:
            for number in threads:
                torch.set_num_threads(number)
                found = outputs(native, spec, rope_dim)
                for a, b in zip(found, wanted, strict=True):
                    assert torch.isfinite(b).all()
                    assert torch.equal(a, b)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("norms", NORMS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_it_is_bit_equal_to_the_kernels_one_by_one(
    name: str, norms: tuple[bool, bool, bool]
) -> None:
    assert_bit_equal(name, norms, threads=(1, 2, 3))


@pytest.mark.parametrize("instruction_set", supported()[:-1])
@pytest.mark.parametrize("name", LAYERS)
def test_it_is_so_on_the_other_instruction_sets(
    name: str, instruction_set: str, use_set: Callable[[str], None]
) -> None:
    use_set(instruction_set)
    assert_bit_equal(name, (True, False, False), threads=(1, 2))


def test_all_instruction_sets_give_the_same_bits(use_set: Callable[[str], None]) -> None:
    found: dict[str, list[Tensor]] = {}
    for name in supported():
        use_set(name)
        weights = Weights(0, int8).layer(PLAIN, (True, False, False), bias=True)
        native = NativeLayer.make(PLAIN, weights, 0, 24)
        assert native is not None
        found[name] = outputs(native, PLAIN, 24)
    for other in found.values():
        for a, b in zip(other, found["portable"], strict=True):
            assert torch.equal(a, b)


def test_not_a_number_in_one_sequence_does_not_touch_the_others() -> None:
    weights = Weights(0, int8).layer(PLAIN, (True, False, False), bias=False)
    native = NativeLayer.make(PLAIN, weights, 0, 24)
    assert native is not None
    shape = KvShape(layers=1, kv_heads=2, head_dim=24, block_size=BLOCK)
    clean, dirty = [], []
    for found, poison in ((clean, 0.0), (dirty, torch.nan)):
        torch.manual_seed(3)
        cache, rotary = InterleavedInt8KvCache(shape, 64), Rotary(RopeSpec(dim=24, theta=9.0), 512)
        context = batches.build(traffic(1)[0], BLOCK).context
        hidden_TK = torch.randn(len(context.positions_T), 48)
        hidden_TK[37:42] += poison  # the second sequence's
        found.append(native(hidden_TK, Step(context, cache, (rotary.tables(context.positions_T),))))
    assert torch.equal(clean[0][:37], dirty[0][:37])
    assert torch.equal(clean[0][42:], dirty[0][42:])
    assert dirty[0][37:42].isnan().any(dim=1).all()


def test_a_matrix_without_a_fused_form_leaves_the_layer_composed() -> None:
    def dense(weight_NK: Tensor, bias_N: Tensor | None) -> Linear:
        return make_linear(weight_NK, "cpu", bias_N)

    weights = Weights(0, dense).layer(PLAIN, (True, False, False), bias=False)
    assert NativeLayer.make(PLAIN, weights, 0, 24) is None
