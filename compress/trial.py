"""A small weight of each scheme goes the whole way: rounded, written, loaded. So the run can say
beforehand which kernels will execute a layer, and what a weight costs.
"""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from compress.block import LinearResult
from compress.errors import writing
from compress.host_speed import mean_seconds
from compress.layer_row import pack_linear
from compress.shards import system_error
from compress.steps import linear_steps
from compress.treatment import Treatment
from engine.formats.checkpoint import Checkpoint, read_header
from engine.kernels import resolve
from engine.models.spec import Matrix
from engine.weights import WeightReader

_ROWS, _COLUMNS = 256, 512
_NAME = "trial"


@dataclass(frozen=True, slots=True)
class Trial:
    """What executes a treatment's layers, and the seconds to round and pack one weight."""

    execution: str
    product: str
    slow: bool
    seconds: float


def try_out(treatment: Treatment, activations: str, dtype: torch.dtype) -> Trial:
    """``activations`` is the recipe's.

    Raises:
        ModelLoadError: nothing executes it.
        CompressError: the folder for temporary files cannot be written to.
    """
    columns = (treatment.group_size or 1) * -(-_COLUMNS // (treatment.group_size or 1))
    zeros_NK = torch.zeros(_ROWS, columns, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    random_NK = torch.randn(_ROWS, columns, generator=generator).to(dtype)
    if treatment.sparse == "2:4":
        random_NK.unflatten(1, (-1, 4))[..., 2:] = 0
    rounding = _rounding(treatment)
    seconds = mean_seconds(lambda: _tensors(rounding, random_NK))
    backend = resolve("auto")
    temporary = Path(tempfile.gettempdir())
    with writing(temporary, "set TMPDIR"), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        try:
            save_file(_tensors(rounding, zeros_NK), file)
        except SafetensorError as error:
            raise system_error(error) from error
        reader = WeightReader(Checkpoint(Path(folder), {}, read_header(file)), backend)
        reader.activations = activations
        linear = reader.matrix(Matrix(modules=(_NAME,)), (_ROWS,), columns)
    # Weights that are unpacked, and products of torch's or of a reference.
    slow = treatment.format is not None and not linear.product.startswith("venturi-")
    return Trial(linear.execution, linear.product, slow, seconds / random_NK.numel())


def kinds(treatments: Iterable[Treatment]) -> dict[tuple[object, ...], Treatment]:
    """One treatment for each way of storing."""
    return {one.scheme_key: one for one in treatments}


def _rounding(treatment: Treatment) -> Treatment:
    """Round to nearest on the same grid, which needs no inputs."""
    quantiser = treatment.quantiser
    if quantiser is not None:
        quantiser = replace(quantiser, type="rtn")
    return replace(treatment, scalings=(), pruner=None, sparsity=None, quantiser=quantiser)


def _tensors(treatment: Treatment, weight_NK: Tensor) -> dict[str, Tensor]:
    quantiser = linear_steps(treatment, weight_NK.dtype).quantiser
    weight = weight_NK if quantiser is None else quantiser.quantise(weight_NK, None).weight
    result = LinearResult(
        weight=weight, outcomes=(), relative_error=0.0, clipped_share=0.0, sparsity=0.0
    )
    dtype = weight_NK.dtype
    return pack_linear(_NAME, treatment, result, transposed=False, dtype=dtype)[0]
