"""Attention's options, LayerNorm, biases and experts against what they must compute."""

import pytest
import torch
from torch import Tensor

from engine.kernels import BACKENDS, kernel, reference, torch_native
from engine.kernels.cpu.linear import PackedInt8Linear
from engine.layers.attention import alibi_slopes
from engine.layers.linear import Int8Linear, Split, make_fused, make_linear
from engine.layers.mlp import make_experts
from engine.layers.weight import quantize_int8
from engine.models.spec import ExpertsSpec
from engine.self_test import check_linear

backends = pytest.mark.parametrize("backend", BACKENDS)
OPTIONS = {
    "scale": {"scale": 0.37},
    "window": {"window": 5},
    "window of one": {"window": 1},
    "window beyond the context": {"window": 99},
    "cap": {"cap": 1.5},
    "cap, scale, window": {"cap": 0.7, "scale": 2.0, "window": 7},
    "alibi": {"slopes_H": torch.tensor([0.5, 0.25, 0.125, 0.7, 0.1, 1.0])},
    "alibi, window": {"slopes_H": torch.linspace(0.1, 1.0, 6), "window": 4},
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("J", [1, 2, 6])
@pytest.mark.parametrize(("L", "lengths"), [(1, [9, 1, 23]), (9, [9]), (4, [17])])
def test_attention_options_are_near_the_reference(
    options: dict[str, object], J: int, L: int, lengths: list[int]
) -> None:
    B, S, H, D = len(lengths), max(lengths) + 3, 6, 10
    q, k, v = randn(B, L, H, D), randn(B, J, S, D, seed=1), randn(B, J, S, D, seed=2)
    for n, length in enumerate(lengths):
        k[n, :, length:] = v[n, :, length:] = 0.0
    found = torch_native.attention(q, k, v, torch.tensor(lengths), **options)
    for n, length in enumerate(lengths):
        keys, values = k[n, :, :length].transpose(0, 1), v[n, :, :length].transpose(0, 1)
        wanted = reference.attention(q[n], keys, values, **options)  # type: ignore[arg-type]
        assert torch.allclose(found[n], wanted, atol=1e-5)


def test_slopes_of_eight_heads_halve_and_others_fill_the_gaps() -> None:
    assert alibi_slopes(8, 8.0).tolist() == [2.0**-i for i in range(1, 9)]
    sixteen = [2.0 ** (-i / 2) for i in range(1, 17)]
    assert alibi_slopes(12, 8.0).tolist() == pytest.approx(sixteen[1::2] + sixteen[::2][:4])


@backends
@pytest.mark.parametrize("bias", [None, randn(77, seed=2)])
def test_layer_norm_is_near_the_exact_one(backend: str, bias: Tensor | None) -> None:
    x, weight = randn(5, 77) * 10 + 3, randn(77, seed=1)
    x[0] = 2.0
    found = kernel("layer_norm", backend)(x, weight, bias, 1e-5)
    wanted = reference.layer_norm(x.double(), weight.double(), bias, 1e-5)
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-5)


@backends
@pytest.mark.parametrize("kinds", ["dd", "ii", "di"])
def test_biases_are_added_after_scaling(backend: str, kinds: str) -> None:
    x, bias = randn(3, 24), randn(9, seed=5)
    matrices = [randn(4, 24, seed=1), randn(5, 24, seed=2)]
    weights = [w if k == "d" else quantize_int8(w) for w, k in zip(matrices, kinds, strict=True)]
    plain, biased = make_fused(weights, backend), make_fused(weights, backend, bias)
    assert torch.equal(biased(x), plain(x) + bias)
    assert biased.nbytes >= plain.nbytes + bias.nbytes
    assert isinstance(biased, Split) == (kinds == "di")
    check_linear(biased)
    assert not isinstance(biased, Int8Linear | PackedInt8Linear) or torch.equal(
        biased(x[:1])[0], biased(x)[0]
    )


def test_a_token_goes_through_the_experts_that_the_router_chose() -> None:
    router = make_linear(torch.eye(3), "torch")
    x = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [5.0, 5.0, -9.0]])
    experts = [lambda rows, n=n: rows * 10**n for n in range(3)]
    for normalise in (False, True):
        spec = ExpertsSpec(count=3, chosen=2, normalise=normalise)
        shares = x.softmax(1)
        for row, chosen in enumerate([(0, 1), (1, 2), (0, 1)]):
            total = float(shares[row, list(chosen)].sum()) if normalise else 1.0
            factor = sum(float(shares[row, n]) * 10**n for n in chosen) / total
            alone = make_experts(spec, router, experts)(x[row : row + 1])[0]
            assert torch.allclose(alone, x[row] * factor)
            assert torch.equal(make_experts(spec, router, experts)(x)[row], alone)
