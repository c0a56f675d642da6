"""Gives decoder layers their own sparsities: one pass of the calibration text before any change."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from compress.methods.owl import allocate, outlier_share
from compress.plan import Plan
from compress.recipe import Modifier
from compress.sequential import Sequential
from compress.treatment import Treatment
from engine.models.spec import LayerNames

Read = Callable[[str], Tensor]


class _Layer(NamedTuple):
    """What one pruner has of one decoder layer; ``size`` counts weights."""

    modules: list[str]
    outliers: float
    size: int


class _Norms:
    """Observes inputs: sums of squares by linear."""

    def __init__(self) -> None:
        self._squares: dict[str, Tensor] = {}

    def __call__(self, modules: tuple[str, ...], x_MK: Tensor) -> None:
        square_K = x_MK.float().square().sum(0)
        for module in modules:
            self._squares[module] = self._squares.get(module, 0) + square_K

    def of(self, module: str, columns: int) -> Tensor:
        """Zeros for an expert that the text never reached."""
        square_K = self._squares.get(module)
        return torch.zeros(columns) if square_K is None else square_K.sqrt()


def allocated(plan: Plan) -> bool:
    """Whether any pruner leaves the sparsities to this module."""
    return any(_owl(treatment) is not None for treatment in plan.treatments.values())


def find_sparsities(plan: Plan, state: Sequential, read: Read) -> Tensor:
    """float64, one for each of ``plan.treatments``; NaN where that has a sparsity or none.

    ``state`` runs through the whole original model; ``read`` gives weights [N, K] by name.
    """
    found: dict[Modifier, list[_Layer]] = defaultdict(list)
    for index, names in enumerate(plan.spec.names):
        norms = _Norms()
        state.advance(index, {}, norms)
        for pruner, modules in _pruned(plan, names).items():
            found[pruner].append(_layer(modules, norms, read))
    sparsities: dict[str, float] = {}
    for pruner, layers in found.items():
        assert isinstance(pruner.sparsity, float)
        outliers, sizes = [one.outliers for one in layers], [one.size for one in layers]
        levels = allocate(outliers, sizes, pruner.sparsity)
        for layer, level in zip(layers, levels, strict=True):
            sparsities |= dict.fromkeys(layer.modules, level)
    every = [sparsities.get(module, math.nan) for module in plan.treatments]
    return torch.tensor(every, dtype=torch.float64)


def with_sparsities(plan: Plan, sparsities: Tensor) -> Mapping[str, Treatment]:
    """The treatments with what ``find_sparsities`` found."""
    levels = zip(plan.treatments.items(), sparsities.tolist(), strict=True)
    return {
        module: one if math.isnan(level) else replace(one, sparsity=level)
        for (module, one), level in levels
    }


def _pruned(plan: Plan, names: LayerNames) -> dict[Modifier, list[str]]:
    by_pruner: dict[Modifier, list[str]] = defaultdict(list)
    for module in (module for matrix in names.matrices() for module in matrix.modules):
        if (pruner := _owl(plan.treatments.get(module))) is not None:
            by_pruner[pruner].append(module)
    return by_pruner


def _layer(modules: list[str], norms: _Norms, read: Read) -> _Layer:
    weights = [read(f"{module}.weight") for module in modules]
    of_inputs = [norms.of(m, w.shape[1]) for m, w in zip(modules, weights, strict=True)]
    size = sum(weight.numel() for weight in weights)
    return _Layer(modules, outlier_share(weights, of_inputs), size)


def _owl(treatment: Treatment | None) -> Modifier | None:
    pruner = None if treatment is None else treatment.pruner
    return None if pruner is None or pruner.allocation is None else pruner
