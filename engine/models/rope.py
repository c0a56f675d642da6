"""Rotary positions: what a config.json says of them -> ``RopeSpec``.

transformers 5 writes ``rope_parameters``, earlier versions ``rope_theta`` and
``rope_scaling``. Source: transformers' ``modeling_rope_utils``.
"""

import math
from collections.abc import Callable
from typing import Any

from engine.models.config import whole
from engine.models.spec import RopeSpec

_TWO_PI = 2 * math.pi


def rope_spec(
    config: dict[str, Any],
    head_dim: int,
    *,
    theta: float = 10000.0,
    share: float | None = None,
    layer_type: str | None = None,
) -> RopeSpec:
    """Rotary positions of a config. Raises ``ValueError`` where they are not served.

    Args:
        config: the model's config.json.
        head_dim: features of a head.
        theta: where the config has none.
        share: part of a head's features that is turned, where the config has none; None for
            families that turn all of them.
        layer_type: whose parameters to read where each type of layer has its own.
    """
    found = _parameters(config, layer_type)
    kind = found.get("rope_type") or found.get("type") or "default"
    read = _KINDS.get(kind)
    if read is None:
        raise ValueError(f"rope_type {kind!r} is not served; served: {', '.join(_KINDS)}")
    part = found.get("partial_rotary_factor")
    if share is None and part not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor {part} is not served in this family")
    dim = int(head_dim * float((share or 1.0) if part is None else part))
    base = float(found.get("rope_theta") or config.get("rope_theta") or theta)
    return read(found, config, RopeSpec(dim=dim, theta=base))


def _parameters(config: dict[str, Any], layer_type: str | None) -> dict[str, Any]:
    found = config.get("rope_parameters") or {}
    if isinstance(found, dict) and layer_type is not None:
        found = found.get(layer_type) or {}
    found = found or config.get("rope_scaling") or {}
    if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
        raise ValueError(f"rope_parameters {found!r} are not served")
    return found


def _original_length(found: dict[str, Any], config: dict[str, Any]) -> int:
    # Phi-3 has it beside the rope parameters, and there it counts first.
    for where in (config, found):
        if where.get("original_max_position_embeddings"):
            return whole(where, "original_max_position_embeddings")
    return whole(config, "max_position_embeddings")


def _default(_found: dict[str, Any], _config: dict[str, Any], rope: RopeSpec) -> RopeSpec:
    return rope


def _linear(found: dict[str, Any], _config: dict[str, Any], rope: RopeSpec) -> RopeSpec:
    return RopeSpec(dim=rope.dim, theta=rope.theta, kind="linear", factor=float(found["factor"]))


def _llama3(found: dict[str, Any], config: dict[str, Any], rope: RopeSpec) -> RopeSpec:
    return RopeSpec(
        dim=rope.dim,
        theta=rope.theta,
        kind="llama3",
        factor=float(found["factor"]),
        original_length=_original_length(found, config),
        low_freq_factor=float(found["low_freq_factor"]),
        high_freq_factor=float(found["high_freq_factor"]),
    )


def _yarn(found: dict[str, Any], config: dict[str, Any], rope: RopeSpec) -> RopeSpec:
    length = _original_length(found, config)
    factor = float(found.get("factor") or whole(config, "max_position_embeddings") / length)

    def feature(rotations: float) -> float:
        turns = length / (rotations * _TWO_PI)
        return rope.dim * math.log(turns) / (2 * math.log(rope.theta))

    low = feature(float(found.get("beta_fast") or 32))
    high = feature(float(found.get("beta_slow") or 1))
    if found.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    return RopeSpec(
        dim=rope.dim,
        theta=rope.theta,
        kind="yarn",
        factor=factor,
        ramp=(low, high + 0.001 if low == high else high),
        amplitude=_yarn_amplitude(found, factor),
    )


def _yarn_amplitude(found: dict[str, Any], factor: float) -> float:
    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if found.get("attention_factor") is not None:
        return float(found["attention_factor"])
    if found.get("mscale") and found.get("mscale_all_dim"):
        return grown(float(found["mscale"])) / grown(float(found["mscale_all_dim"]))
    return grown(1.0)


def _longrope(found: dict[str, Any], config: dict[str, Any], rope: RopeSpec) -> RopeSpec:
    """The short factors, up to the original length.

    Beyond it the frequencies change with the sequence's length, for keys that are cached too.
    """
    length = _original_length(found, config)
    factor = float(found.get("factor") or whole(config, "max_position_embeddings") / length)
    grown = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    amplitude = found.get("attention_factor")
    return RopeSpec(
        dim=rope.dim,
        theta=rope.theta,
        kind="longrope",
        divisors=tuple(float(value) for value in found["short_factor"]),
        amplitude=grown if amplitude is None else float(amplitude),
        limit=length,
    )


_KINDS: dict[str, Callable[[dict[str, Any], dict[str, Any], RopeSpec], RopeSpec]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,
}
