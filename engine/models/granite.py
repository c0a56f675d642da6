"""Granite 3: Llama with multipliers on embedding, scores, residuals and logits."""

from dataclasses import replace

from engine.models import llama
from engine.models.config import Config
from engine.models.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where the config makes no sense."""
    base = llama.spec(config)
    layer = replace(
        base.layer,
        scale=float(config["attention_multiplier"]),
        residual_scale=float(config["residual_multiplier"]),
    )
    return replace(
        base,
        layers=(layer,) * len(base.layers),
        embedding_scale=float(config["embedding_multiplier"]),
        logit_divisor=float(config["logits_scaling"]),
    )
