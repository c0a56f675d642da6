"""Native norms and activation functions, alone and with quantisation, on all sets."""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import reference
from engine.kernels.cpu.library import address, kernels, supported
from engine.kernels.cpu.linear import Activations
from engine.kernels.cpu.norm import (
    FUNCTIONS,
    ActivateQuantizeArgs,
    Norm,
    NormArgs,
    NormQuantizeArgs,
)

ROWS = (1, 2, 5, 12, 13, 65)
COLUMNS = (1, 3, 16, 65, 100)
sets = pytest.mark.parametrize("name", supported())


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Quantized:
    """Buffers of the quantised rows of [M, K], and what lies in them in plain order."""

    def __init__(self, M: int, K: int, group: int = 0) -> None:
        unit = group or 16
        self.width = -(-K // unit) * unit
        self.groups = self.width // group if group else 1
        self.q = torch.full((M * self.width,), 99, dtype=torch.int8)
        self.sums = torch.empty(M * self.groups, dtype=torch.int32)
        self.scale_M = torch.empty(M)
        buffers = (address(self.q), address(self.scale_M), address(self.sums))
        self.activations = Activations(*buffers, M, K, group)
        self.columns = K

    def check(self, x_MK: Tensor) -> None:
        """The buffers hold ``x_MK`` quantised."""
        M, count = len(x_MK), -(-len(x_MK) // 12)
        begin, rows, sums = 0, [], []
        for index in range(count):
            height = M // count + (index < M % count)
            end = begin + height
            tile = self.q[begin * self.width : end * self.width]
            rows.append(tile.view(-1, height, 4).transpose(0, 1).reshape(height, -1))
            part = self.sums[begin * self.groups : end * self.groups]
            sums.append(part.view(self.groups, height).t())
            begin = end
        q_MW = torch.cat(rows)
        wanted, scale_M = reference.quantize_activations(x_MK)
        assert torch.equal(q_MW[:, : self.columns], wanted)
        assert not bool(q_MW[:, self.columns :].any())
        assert torch.equal(self.scale_M, scale_M)
        assert torch.equal(torch.cat(sums), q_MW.int().view(M, self.groups, -1).sum(2).int())


def norm_of(x_MK: Tensor, norm: Norm, name: str) -> Tensor:
    out_MK = torch.empty_like(x_MK)
    args = NormArgs(address(x_MK), norm, address(out_MK), len(x_MK), 2)
    kernels(name).entry("norm")(ctypes.byref(args))
    return out_MK


@sets
@pytest.mark.parametrize("K", COLUMNS)
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("group", [0, 32])
def test_norms_alone_and_quantised(name: str, K: int, rms: bool, group: int) -> None:
    weight, bias = randn(K, seed=1), None if rms else randn(K, seed=2)
    norm = Norm(address(weight), None if bias is None else address(bias), K, 1e-5, rms)
    for M in ROWS:
        x_MK = randn(M, K, seed=M) * 3 + 1
        x_MK[0] = 0.0
        found = norm_of(x_MK, norm, name)
        exact = x_MK.double()
        if rms:
            wanted = reference.rms_norm(exact, weight.double(), 1e-5)
        else:
            wanted = reference.layer_norm(exact, weight.double(), bias, 1e-5)
        assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(norm_of(x_MK[M // 2 :][:1], norm, name)[0], found[M // 2])
        assert torch.equal(found, norm_of(x_MK, norm, "portable"))
        for threads in (1, 2):
            quantized = Quantized(M, K, group)
            args = NormQuantizeArgs(address(x_MK), norm, quantized.activations, threads)
            kernels(name).entry("norm_quantize")(ctypes.byref(args))
            quantized.check(found)


def activated(
    x_MK: Tensor, function: str, gated: bool, name: str, threads: int = 1
) -> tuple[Tensor, Quantized]:
    """What is left in place, and the buffers."""
    K = x_MK.shape[1] // (2 if gated else 1)
    x_MK, quantized = x_MK.clone(), Quantized(len(x_MK), K)
    place = FUNCTIONS.index(function)
    args = ActivateQuantizeArgs(address(x_MK), place, gated, quantized.activations, threads)
    kernels(name).entry("activate_quantize")(ctypes.byref(args))
    return x_MK[:, :K].contiguous(), quantized


@sets
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("K", COLUMNS)
def test_activations_are_near_those_of_torch(name: str, function: str, gated: bool, K: int) -> None:
    for M in ROWS:
        x_MK = randn(M, K * (2 if gated else 1), seed=M) * 4
        wanted = reference.activation(x_MK[:, :K], function, gated=False)
        if gated:
            wanted = wanted * x_MK[:, K:]
        found, quantized = activated(x_MK, function, gated, name, threads=1 + M % 2)
        assert torch.allclose(found, wanted, rtol=1e-5, atol=3e-6)
        assert torch.equal(found, activated(x_MK, function, gated, "portable")[0])
        quantized.check(found)


@sets
@pytest.mark.parametrize("function", FUNCTIONS)
def test_activations_of_extreme_values(name: str, function: str) -> None:
    x_MK = torch.tensor([[-1e30, -200.0, -88.0, -1e-30, 0.0, 1e-30, 50.0, 200.0, 1e30]])
    found, _ = activated(x_MK, function, False, name)
    wanted = reference.activation(x_MK, function, gated=False)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-30)
    assert bool(activated(torch.tensor([[torch.nan]]), function, False, name)[0].isnan())


def test_exponents_keep_their_precision() -> None:
    """silu(x) / x = 1 / (1 + exp(-x)), over the whole range of exp."""
    x_MK = torch.linspace(-80, 20, 20001)[None]
    found, _ = activated(x_MK, "silu", False, "portable")
    wanted = F.silu(x_MK.double())
    assert torch.allclose(found.double(), wanted, rtol=2e-6, atol=0)
