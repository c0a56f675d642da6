"""From a treatment to the methods that do it."""

from collections.abc import Callable

import torch

from compress.block import LinearSteps
from compress.methods.awq import Awq
from compress.methods.base import Pruner, Quantiser, Scaling
from compress.methods.gptq import Gptq
from compress.methods.magnitude import Magnitude
from compress.methods.masks import Sparsity
from compress.methods.rtn import Rtn
from compress.methods.scheme import Scheme
from compress.methods.smoothquant import SmoothQuant
from compress.methods.sparsegpt import Joint, SparseGpt
from compress.methods.wanda import Wanda
from compress.recipe import Modifier
from compress.treatment import FLOAT_QUANTIZED, Treatment

# Of the weights that may be compressed, by safetensors' names.
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_PRUNERS: dict[str, Callable[[Sparsity], Pruner]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGpt,
}


def linear_steps(treatment: Treatment, dtype: torch.dtype) -> LinearSteps:
    """The methods of one linear, whose scales shall have ``dtype``."""
    scheme = _scheme(treatment, dtype)
    sparsity = _sparsity(treatment)
    return LinearSteps(
        scalings=tuple(_scaling(one, scheme) for one in treatment.scalings),
        pruner=_pruner(treatment, sparsity),
        quantiser=_quantiser(treatment, scheme, sparsity),
    )


def _scheme(treatment: Treatment, dtype: torch.dtype) -> Scheme:
    quantiser = treatment.quantiser
    return Scheme(
        kind="float8" if treatment.format == FLOAT_QUANTIZED else "int",
        bits=treatment.bits or 8,
        group_size=treatment.group_size,
        symmetric=treatment.symmetric,
        scale="absmax" if quantiser is None or quantiser.scale is None else quantiser.scale,
        dtype=dtype,
    )


def _sparsity(treatment: Treatment) -> Sparsity | None:
    pruner = treatment.pruner
    if pruner is None or treatment.sparsity is None or pruner.structure is None:
        return None
    return Sparsity(share=treatment.sparsity, structure=pruner.structure)


def _scaling(modifier: Modifier, scheme: Scheme) -> Scaling:
    if modifier.type == "awq":
        return Awq(scheme, clip=bool(modifier.clip))
    assert modifier.alpha is not None
    return SmoothQuant(modifier.alpha, scheme)


def _pruner(treatment: Treatment, sparsity: Sparsity | None) -> Pruner | None:
    if treatment.pruner is None or sparsity is None:
        return None
    return _PRUNERS[treatment.pruner.type](sparsity)


def _quantiser(treatment: Treatment, scheme: Scheme, sparsity: Sparsity | None) -> Quantiser | None:
    modifier, pruner = treatment.quantiser, treatment.pruner
    if modifier is None:
        return None
    if modifier.type == "awq":
        return Awq(scheme, clip=bool(modifier.clip))
    if modifier.type == "rtn":
        return Rtn(scheme)
    if pruner is not None and pruner.type == "sparsegpt" and sparsity is not None:
        return Joint(sparsity, scheme)
    return Gptq(scheme, by_activation=modifier.actorder == "static")
