"""compressed-tensors' ``float-quantized``: FP8 weights, one scale for each output channel.

Tensors of a linear layer: ``weight`` float8_e4m3fn [N, K], ``weight_scale`` [N, 1] in the
model's dtype; weight = q * scale. Activations become FP8 too, per token when the layer runs.
Transposed layers as in ``int_quantized``.

e4m3fn has 4 bits of exponent and 3 of mantissa, no infinity, one NaN, and 448 as its largest
value (Micikevicius et al., "FP8 formats for deep learning", 2022).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FORMAT = "float-quantized"
DTYPE = torch.float8_e4m3fn
LARGEST = 448.0


def to_float8(values: Tensor) -> Tensor:
    """The nearest FP8 values, ties to even; what is too large becomes the largest, NaN stays."""
    return values.clamp(-LARGEST, LARGEST).to(DTYPE)


@dataclass(frozen=True, slots=True)
class Float8Weight:
    """``q_NK`` float8_e4m3fn, ``scale_N`` floating point; the weight is ``q * scale``."""

    q_NK: Tensor
    scale_N: Tensor

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        return self.q_NK.float() * self.scale_N.float()[:, None]

    def rows(self, ids_T: Tensor | slice) -> "Float8Weight":
        """Some out-features."""
        return Float8Weight(self.q_NK[ids_T], self.scale_N[ids_T])


def pack(weight: Float8Weight, *, transposed: bool = False) -> dict[str, Tensor]:
    """The layer's tensors, by their names after the module's name."""
    tensors = {"weight": weight.q_NK, "weight_scale": weight.scale_N[:, None]}
    return {name: (t.t() if transposed else t).contiguous() for name, t in tensors.items()}


def unpack(tensors: dict[str, Tensor], *, transposed: bool = False) -> Float8Weight:
    """Inverse of ``pack``. Raises ``ValueError`` on other dtypes or shapes, and on NaN."""
    q_NK, scale = tensors["weight"], tensors["weight_scale"]
    if transposed:
        q_NK, scale = q_NK.t(), scale.t()
    if q_NK.dtype != DTYPE or q_NK.ndim != 2:
        raise ValueError(f"weight must be float8_e4m3fn [N, K], not {q_NK.dtype}")
    if not scale.is_floating_point() or scale.shape != (q_NK.shape[0], 1):
        raise ValueError(f"weight_scale must be floating [N, 1], not {list(scale.shape)}")
    if "weight_zero_point" in tensors and bool(tensors["weight_zero_point"].float().any()):
        raise ValueError("weight_zero_point must be 0")
    if bool(q_NK.isnan().any()):
        raise ValueError("weight has NaN values")
    return Float8Weight(q_NK, scale[:, 0])


def config_group(targets: list[str]) -> dict[str, object]:
    """This scheme as one of ``quantization_config``'s config_groups."""
    float8 = {"num_bits": 8, "type": "float", "symmetric": True}
    weights = {**float8, "dynamic": False, "strategy": "channel", "observer": "minmax"}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": {**float8, "dynamic": True, "strategy": "token", "observer": None},
        "output_activations": None,
        "format": FORMAT,
    }
