"""What a calibrated job will need, from shapes alone."""

from compress.plan import Plan
from compress.recipe import Recipe

_SPARE_BYTES = 300 << 20


def calibration_bytes(plan: Plan, recipe: Recipe) -> int:
    """Memory: two layers in float32, the samples' hidden states, and one layer's Hessians.

    While the widest Hessian is factored, three more of its size are held.
    """
    calibration = recipe.calibration
    assert calibration is not None
    one = plan.spec.layer
    heads, kv = one.heads * one.head_dim, one.kv_heads * one.head_dim
    experts = 1 if one.experts is None else one.experts.count
    mlp = (3 if one.gated else 2) * one.hidden_size * one.mlp_size * experts
    weights = one.hidden_size * (2 * heads + 2 * kv) + mlp
    widths = (one.hidden_size, heads, *[one.hidden_size, one.mlp_size] * experts)
    hessians = sum(width**2 for width in widths) + 3 * max(widths) ** 2
    tokens = calibration.samples * min(calibration.length, plan.spec.context_length)
    return 4 * (2 * weights + hessians + tokens * one.hidden_size) + _SPARE_BYTES
