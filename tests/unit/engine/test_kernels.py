"""Kernels against their references: odd shapes, extreme values, batches against single rows."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import ModelLoadError
from engine.formats.int_quantized import Int8Weight
from engine.kernels import BACKENDS, TABLE, kernel, reference, torch_native
from engine.layers.linear import Int8Linear, Split, make_fused, make_linear
from engine.layers.weight import quantize_int8
from engine.self_test import check_linear

LINEAR_SHAPES = [(1, 1, 1), (1, 33, 7), (3, 64, 64), (5, 100, 257), (17, 31, 3), (130, 96, 48)]
backends = pytest.mark.parametrize("backend", BACKENDS)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_int8(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


@backends
@pytest.mark.parametrize(("M", "K", "N"), LINEAR_SHAPES)
def test_int8_linear_is_bit_equal(backend: str, M: int, K: int, N: int) -> None:
    x, q, scale = randn(M, K), random_int8(N, K), torch.rand(N)
    wanted = reference.int8_linear(x, q, scale)
    assert torch.equal(kernel("int8_linear", backend)(x, q, scale), wanted)


@backends
@pytest.mark.parametrize("K", [64, 1000, 4096])
@pytest.mark.parametrize("fill", [-128, 127])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_int8_linear_does_not_saturate(backend: str, K: int, fill: int, sign: float) -> None:
    """All products at their largest: instructions that add pairs in 16 bits would overflow."""
    x = torch.full((2, K), sign)
    q = torch.full((5, K), fill, dtype=torch.int8)
    found = kernel("int8_linear", backend)(x, q, torch.ones(5))
    assert torch.equal(found, reference.int8_linear(x, q, torch.ones(5)))
    assert float(found[0, 0]) == pytest.approx(sign * fill * K, rel=1e-6)


WITHOUT_VNNI = """
import torch
from engine.kernels import kernel, reference
torch.set_num_threads(1)
x, q = torch.full((4, 64), 1.0), torch.full((9, 64), -128, dtype=torch.int8)
found = kernel("int8_linear", "torch")(x, q, torch.ones(9))
assert torch.equal(found, reference.int8_linear(x, q, torch.ones(9))), found[0, 0]
"""


def test_int8_linear_does_not_saturate_on_processors_without_vnni() -> None:
    """oneDNN is told to use AVX2 only, as on most machines from before 2019."""
    subprocess.run(
        [sys.executable, "-c", WITHOUT_VNNI],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        cwd=Path(__file__).parents[3],
        check=True,
    )


@backends
def test_int8_linear_takes_zero_rows_and_outliers(backend: str) -> None:
    x = randn(6, 70)
    x[0] = 0.0
    x[1] *= 1e-30
    x[2, 3] = 1e4
    x[3] = 0.5  # 0.5 * (127 / 0.5) is exact, and so is every tie that follows
    x[4] = torch.arange(70) / 2 / 127
    q, scale = random_int8(9, 70), torch.rand(9)
    q[4], scale[5] = -128, 0.0
    found = kernel("int8_linear", backend)(x, q, scale)
    assert torch.equal(found, reference.int8_linear(x, q, scale))
    assert not bool(found[0].any())
    assert bool(torch.isfinite(found).all())


@backends
@pytest.mark.parametrize("M", [2, 3, 8, 33])
def test_int8_linear_gives_a_row_the_same_alone(backend: str, M: int) -> None:
    linear = kernel("int8_linear", backend)
    x, q, scale = randn(M, 96), random_int8(40, 96), torch.rand(40)
    together = linear(x, q, scale)
    for row in range(M):
        assert torch.equal(linear(x[row : row + 1], q, scale)[0], together[row])


@backends
def test_int8_linear_is_near_the_dense_product(backend: str) -> None:
    x, dense = randn(4, 256), randn(32, 256, seed=1)
    linear = make_linear(quantize_int8(dense), backend)
    wanted = x @ dense.t()
    assert float((linear(x) - wanted).abs().max() / wanted.abs().max()) < 0.02


def test_activations_round_half_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]])
    q, scale = reference.quantize_activations(x)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -126]]
    assert float(scale) == pytest.approx(1.0)


def test_activations_of_a_zero_row_have_scale_zero() -> None:
    q, scale = reference.quantize_activations(torch.zeros(2, 5))
    assert not bool(q.any())
    assert scale.tolist() == [0.0, 0.0]


@backends
@pytest.mark.parametrize(("M", "K", "N"), LINEAR_SHAPES)
def test_dense_linear_is_near_the_exact_product(backend: str, M: int, K: int, N: int) -> None:
    x, weight = randn(M, K), randn(N, K, seed=1)
    found = kernel("dense_linear", backend)(x, weight)
    assert torch.allclose(found.double(), x.double() @ weight.double().t(), atol=1e-4)


@backends
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_rms_norm_is_near_the_exact_one(backend: str, scale: float) -> None:
    x, weight = randn(5, 77) * scale, randn(77, seed=1)
    x[0] = 0.0
    found = kernel("rms_norm", backend)(x, weight, 1e-5)
    wanted = reference.rms_norm(x.double(), weight.double(), 1e-5)
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-6)


def attention_case(
    lengths: list[int], L: int, H: int, J: int, D: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random queries, and keys and values padded with zeros as a cache reads them."""
    B, S = len(lengths), max(lengths) + 3
    q, k, v = randn(B, L, H, D, seed=seed), randn(B, J, S, D, seed=seed + 1), randn(B, J, S, D)
    for n, length in enumerate(lengths):
        k[n, :, length:] = v[n, :, length:] = 0.0
    return q, k, v, torch.tensor(lengths)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, **options: Any) -> Tensor:
    attend = functools.partial(reference.attention, **options)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    rows = enumerate(lengths.tolist())
    return torch.stack([attend(q[n], k[n, :end], v[n, :end]) for n, end in rows])


HEADS = [(4, 4, 16), (6, 3, 10), (8, 1, 32), (2, 1, 2), (8, 4, 64)]


@pytest.mark.parametrize(("H", "J", "D"), HEADS)
@pytest.mark.parametrize("lengths", [[1], [1, 1], [5, 1, 9, 64], [33, 32, 31]])
def test_decode_attention_is_near_the_reference(H: int, J: int, D: int, lengths: list[int]) -> None:
    case = attention_case(lengths, 1, H, J, D)
    found = torch_native.attention(*case)
    assert found.shape == (len(lengths), 1, H, D)
    assert torch.allclose(found, attention_reference(*case), atol=1e-5)


@pytest.mark.parametrize(("H", "J", "D"), HEADS)
@pytest.mark.parametrize(("L", "length"), [(2, 2), (7, 7), (5, 40), (33, 34), (1, 50)])
def test_prefill_attention_is_near_the_reference(
    H: int, J: int, D: int, L: int, length: int
) -> None:
    case = attention_case([length], L, H, J, D, seed=L)
    found = torch_native.attention(*case)
    assert torch.allclose(found, attention_reference(*case), atol=1e-5)


OPTIONS: dict[str, dict[str, Any]] = {
    "scale": {"scale": 0.3},
    "window of one": {"window": 1},
    "window": {"window": 7},
    "window and all": {"window": 1000},
    "cap": {"cap": 2.5},
    "cap and window": {"cap": 0.5, "window": 5, "scale": 1.5},
    "slopes": {"slopes_H": torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.0])},
    "slopes and window": {"slopes_H": torch.linspace(0, 1, 6), "window": 6},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    ("L", "lengths"), [(1, [5, 1, 9, 64]), (1, [33]), (7, [7]), (5, [40]), (33, [34])]
)
def test_attention_with_options_is_near_the_reference(
    name: str, L: int, lengths: list[int]
) -> None:
    case, options = attention_case(lengths, L, 6, 3, 10, seed=L), OPTIONS[name]
    found = torch_native.attention(*case, **options)
    assert torch.allclose(found, attention_reference(*case, **options), atol=1e-5)


def test_a_window_hides_what_is_before_it() -> None:
    q, k, v, _ = attention_case([12], 1, 2, 1, 4)
    k, v = k.transpose(1, 2)[0, :12], v.transpose(1, 2)[0, :12]
    whole = reference.attention(q[0], k[-4:], v[-4:])
    assert torch.allclose(reference.attention(q[0], k, v, window=4), whole, atol=1e-6)


def test_slopes_prefer_what_is_near() -> None:
    """Equal keys: the probabilities are those of the slope alone."""
    k, v = torch.zeros(3, 1, 4), torch.eye(3)[:, None]
    out = reference.attention(torch.ones(1, 1, 4), k, v, slopes_H=torch.tensor([2.0]))
    assert torch.allclose(out[0, 0], torch.tensor([-4.0, -2.0, 0.0]).softmax(0), atol=1e-6)


@backends
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_layer_norm_is_near_the_exact_one(backend: str, scale: float, bias: bool) -> None:
    x, weight = randn(5, 77) * scale + scale, randn(77, seed=1)
    x[0] = 3.0
    bias_K = randn(77, seed=2) if bias else None
    found = kernel("layer_norm", backend)(x, weight, bias_K, 1e-5)
    wanted = torch.nn.functional.layer_norm(
        x.double(), (77,), weight.double(), None if bias_K is None else bias_K.double(), 1e-5
    )
    assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-4)
    assert torch.allclose(reference.layer_norm(x, weight, bias_K, 1e-5), found, atol=1e-3)


def test_attention_survives_large_scores() -> None:
    q, k, v, lengths = attention_case([9, 20], 1, 4, 2, 8)
    case = (q * 100, k * 100, v, lengths)
    found = torch_native.attention(*case)
    assert torch.allclose(found, attention_reference(*case), atol=1e-5)


def test_attention_sees_no_future() -> None:
    q, k, v, lengths = attention_case([12], 6, 4, 2, 8)
    before = torch_native.attention(q, k, v, lengths)
    k[:, :, 9:12] += 5.0
    v[:, :, 9:12] -= 5.0
    after = torch_native.attention(q, k, v, lengths)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_the_table_finds_every_kernel() -> None:
    for operation, backend in TABLE:
        assert callable(kernel(operation, backend))


def test_every_backend_has_every_operation() -> None:
    operations = {operation for operation, _ in TABLE}
    for backend in BACKENDS:
        assert {operation for operation, name in TABLE if name == backend} == operations


@pytest.mark.parametrize(("operation", "name"), [("int8_linear", "nobody"), ("magic", "torch")])
def test_a_kernel_that_does_not_exist_is_refused(operation: str, name: str) -> None:
    with pytest.raises(ModelLoadError, match=name):
        kernel(operation, name)


def int8(rows: int, columns: int = 24, seed: int = 0) -> Int8Weight:
    return Int8Weight(random_int8(rows, columns, seed=seed), torch.rand(rows) + 0.01)


@backends
def test_fused_layers_give_what_single_ones_give(backend: str) -> None:
    x = randn(3, 24)
    quantised, dense = [int8(5), int8(7, seed=1)], [randn(4, 24), randn(2, 24, seed=1)]
    for weights in (quantised, dense, [*quantised, *dense]):
        singles = [make_linear(weight, backend)(x) for weight in weights]
        fused = make_fused(weights, backend)
        assert isinstance(fused, Split) == (len(weights) == 4)
        assert torch.allclose(fused(x), torch.cat(singles, 1), atol=1e-6)
        check_linear(fused)


@backends
def test_biases_are_added_where_their_features_are(backend: str) -> None:
    x = randn(3, 24)
    quantised, dense = [int8(5), int8(7, seed=1)], [randn(5, 24), randn(7, 24, seed=1)]
    for weights in (quantised, dense, [quantised[0], dense[1]]):
        bias = randn(12, seed=3)
        plain, biased = make_fused(weights, backend), make_fused(weights, backend, bias)
        assert torch.equal(biased(x), plain(x) + bias)
        assert biased.nbytes >= plain.nbytes + bias.nbytes
        check_linear(biased)


@backends
def test_the_self_test_passes_good_layers(backend: str) -> None:
    for rows in (1, 64, 65, 200):
        check_linear(make_linear(int8(rows), backend))
        check_linear(make_linear(randn(rows, 24), backend))


def test_the_self_test_finds_a_kernel_that_is_off_by_one_bit() -> None:
    weight = int8(6)

    def broken(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        out = reference.int8_linear(x, q, scale)
        out[-1, 3] = torch.nextafter(out[-1, 3], torch.tensor(torch.inf))
        return out

    with pytest.raises(ModelLoadError, match="self-test"):
        check_linear(Int8Linear(weight.q_NK, weight.scale_N, broken))


def test_the_self_test_finds_a_kernel_that_fails_on_several_rows_only() -> None:
    good, weight = make_linear(randn(6, 24), "torch"), randn(6, 24)

    def broken(x: Tensor, w: Tensor) -> Tensor:
        return x @ w.t() * (1.0 if len(x) == 1 else 1.01)

    check_linear(good)
    linear = type(good)(weight, broken)  # type: ignore[call-arg]
    with pytest.raises(ModelLoadError, match="self-test"):
        check_linear(linear)
    with pytest.raises(ModelLoadError, match="self-test"):
        check_linear(Split((good, linear)))


def test_the_self_test_finds_swapped_out_features() -> None:
    weight = int8(6)

    def swapped(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        return reference.int8_linear(x, q, scale).flip(1)

    with pytest.raises(ModelLoadError):
        check_linear(Int8Linear(weight.q_NK, weight.scale_N, swapped))
