"""Compresses one decoder layer: scalings, then pruning and rounding of each linear."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from compress.methods.awq import Awq
from compress.methods.base import Outcome, Pruned, Pruner, Quantiser, Rounded, Scaling
from compress.methods.grid import RoundedWeight
from compress.methods.inputs import LayerInputs
from compress.methods.sparsegpt import Joint
from compress.scaling import Read, Scaled, ScalePlace, all_within, linear_places, norm_places
from engine.models.spec import LayerNames, LayerSpec

# (linears that share an input) -> what was captured of it.
Captured = dict[tuple[str, ...], LayerInputs]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSteps:
    """What happens to one linear, in this order; None: nothing."""

    scalings: tuple[Scaling, ...] = ()
    pruner: Pruner | None = None
    quantiser: Quantiser | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearResult:
    """A linear's new weight, floating where it was not rounded, and how it came to it."""

    weight: RoundedWeight | Tensor
    outcomes: tuple[Outcome, ...]
    relative_error: float
    clipped_share: float
    sparsity: float


@dataclass(frozen=True, slots=True)
class BlockResult:
    """Linears by module name, and the vectors (norms) that scalings changed, by tensor name."""

    linears: dict[str, LinearResult]
    vectors: dict[str, Tensor] = field(default_factory=dict)


def compress_block(
    layer: LayerSpec,
    names: LayerNames,
    steps: Mapping[str, LinearSteps],
    read: Read,
    captured: Captured,
) -> BlockResult:
    """Args:
    layer, names: of the decoder layer.
    steps: by module name; others stay as they are.
    read: tensors by name; linears as [N, K].
    captured: inputs, for the linears whose steps need them; taken out when those are done, since
        a Hessian may be as large as a layer.
    """
    scaled = Scaled(read, layer)
    by_module = {module: modules for modules in captured for module in modules}
    for place in (*norm_places(names), *linear_places(layer, names)):
        _scale(place, scaled, steps, by_module, captured)
    linears: dict[str, LinearResult] = {}
    for matrix in names.matrices():
        shared = captured.pop(matrix.modules, None)
        inputs = None if shared is None else scaled.inputs(matrix.modules, shared)
        for module in matrix.modules:
            if module in steps:
                linears[module] = _linear(steps[module], scaled.weight(module), inputs)
    return BlockResult(linears, scaled.vectors)


def _scale(
    place: ScalePlace,
    scaled: Scaled,
    steps: Mapping[str, LinearSteps],
    by_module: Mapping[str, tuple[str, ...]],
    captured: Captured,
) -> None:
    """Scales by the last scaling of the readers, where all of them have the same."""
    if not all_within(place, steps):
        return
    wanted = {steps[module].scalings for module in place.readers}
    scalings = wanted.pop() if len(wanted) == 1 else ()
    for scaling in scalings:
        modules = by_module[place.readers[0]]
        inputs = scaled.inputs(modules, captured[modules])
        weights = [scaled.weight(module) for module in place.readers]
        if place.norm is not None:
            scaled.fold(place, scaling.search(weights, inputs))
        # SmoothQuant's outliers are the norms'; AWQ also balances linear against linear.
        elif isinstance(scaling, Awq):
            scaled.fold(place, scaling.search(weights, inputs, place.tie))


def _linear(steps: LinearSteps, weight_NK: Tensor, inputs: LayerInputs | None) -> LinearResult:
    pruner, quantiser = steps.pruner, steps.quantiser
    if pruner is None and quantiser is None:
        return LinearResult(
            weight=weight_NK, outcomes=(), relative_error=0.0, clipped_share=0.0,
            sparsity=_sparsity(weight_NK),
        )  # fmt: skip
    if pruner is None:
        assert quantiser is not None
        return _rounded(quantiser.quantise(weight_NK, inputs), ())
    if isinstance(quantiser, Joint):
        return _rounded(quantiser.quantise(weight_NK, inputs), ())
    assert inputs is not None
    pruned = pruner.prune(weight_NK, inputs)
    if quantiser is None:
        return _pruned(weight_NK, pruned)
    result = quantiser.quantise(pruned.weight_NK, inputs, pruned.mask_NK)
    return _rounded(result, (pruned.outcome,))


def _rounded(result: Rounded, before: tuple[Outcome, ...]) -> LinearResult:
    return LinearResult(
        weight=result.weight,
        outcomes=(*before, result.outcome),
        relative_error=result.relative_error,
        clipped_share=result.clipped_share,
        sparsity=_sparsity(result.weight.dequantize()),
    )


def _pruned(weight_NK: Tensor, result: Pruned) -> LinearResult:
    weight_NK = weight_NK.float()
    norm = float(weight_NK.norm())
    return LinearResult(
        weight=result.weight_NK,
        outcomes=(result.outcome,),
        relative_error=float((result.weight_NK - weight_NK).norm()) / norm if norm else 0.0,
        clipped_share=0.0,
        sparsity=_sparsity(result.weight_NK),
    )


def _sparsity(weight_NK: Tensor) -> float:
    return float((weight_NK == 0).float().mean())
