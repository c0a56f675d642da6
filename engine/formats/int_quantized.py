"""compressed-tensors' ``int-quantized``: a byte for each weight, int8 activations.

Tensors of a linear layer: ``weight`` int8 [N, K], ``weight_scale`` [N, 1] in the model's
dtype; weight = q * scale. Activations are quantised per token when the layer runs. Layers
that store their weight as [K, N] (GPT-2's Conv1D) keep doing so: both tensors are
transposed, the scale to [1, N], and weight = q * scale still holds. Others write 4 bits in
groups so too, [N, G] scales and integers in [-8, 7], which is read and not written.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.formats.grouped import GroupedWeight

FORMAT = "int-quantized"


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """``q_NK`` int8, ``scale_N`` floating point; the weight is ``q * scale``."""

    q_NK: Tensor
    scale_N: Tensor

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        return self.q_NK.float() * self.scale_N.float()[:, None]


def pack(weight: Int8Weight, *, transposed: bool = False) -> dict[str, Tensor]:
    """The layer's tensors, by their names after the module's name."""
    tensors = {"weight": weight.q_NK, "weight_scale": weight.scale_N[:, None]}
    return {name: (t.t() if transposed else t).contiguous() for name, t in tensors.items()}


def unpack(tensors: dict[str, Tensor], *, transposed: bool = False) -> Int8Weight | GroupedWeight:
    """Inverse of ``pack``. Raises ``ValueError`` on other dtypes or shapes."""
    q_NK, scale = tensors["weight"], tensors["weight_scale"]
    if transposed:
        q_NK, scale = q_NK.t(), scale.t()
    if q_NK.dtype != torch.int8 or q_NK.ndim != 2:
        raise ValueError(f"weight must be int8 [N, K], not {q_NK.dtype} {list(q_NK.shape)}")
    if not scale.is_floating_point() or scale.ndim != 2 or len(scale) != len(q_NK):
        raise ValueError(f"weight_scale must be floating [N, G], not {list(scale.shape)}")
    # Some writers store the zero points of symmetric grids too.
    if "weight_zero_point" in tensors and bool(tensors["weight_zero_point"].any()):
        raise ValueError("weight_zero_point must be 0")
    groups = scale.shape[1]
    if groups == 1:
        return Int8Weight(q_NK, scale[:, 0])
    low, high = (int(value) for value in q_NK.aminmax())
    if not groups or q_NK.shape[1] % groups or not -8 <= low <= high <= 7:
        raise ValueError(f"weight_scale [N, {groups}] must be of 4 bits in groups")
    return GroupedWeight(q_NK, scale)


def config_group(targets: list[str]) -> dict[str, object]:
    """This scheme as one of ``quantization_config``'s config_groups."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True}
    return {
        "targets": targets,
        "weights": {**weights, "strategy": "channel", "observer": "minmax"},
        "input_activations": {**activations, "strategy": "token", "observer": None},
        "output_activations": None,
        "format": FORMAT,
    }
