"""SmolLM3: Llama in which every fourth layer has no positions."""

from dataclasses import replace

from engine.models import llama
from engine.models.config import Config, tied, whole, windows
from engine.models.rope import rope_spec
from engine.models.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where the config makes no sense."""
    base = llama.spec(config)
    count, interval = len(base.layers), whole(config, "no_rope_layer_interval", 4)
    turned = config.get("no_rope_layers")
    if turned is None:
        turned = [(i + 1) % interval != 0 for i in range(count)]
    used = bool(config.get("use_sliding_window")) and config.get("sliding_window") is not None
    sliding = windows(config, lambda i: used and not turned[i])
    layers = [
        replace(base.layer, rope=0 if has_rope else None, window=window)
        for has_rope, window in zip(turned, sliding, strict=True)
    ]
    rope = rope_spec(config, base.layer.head_dim, theta=2e6)
    return replace(base, layers=tuple(layers), ropes=(rope,), tied_head=tied(config, default=True))
