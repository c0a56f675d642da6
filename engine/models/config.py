"""What families share: keys of config.json that mean the same, and Llama's layer names."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from engine.models.spec import (
    Activation,
    LayerNames,
    LayerSpec,
    Matrix,
    MlpNames,
    ModelSpec,
    NormSpec,
    RopeSpec,
)

Config = dict[str, Any]
LLAMA_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_LAYER_TYPES = ("full_attention", "sliding_attention")
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def layer_spec(config: Config, **values: Any) -> LayerSpec:
    """A layer from the keys that most families use; ``values`` win over them."""
    hidden, heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
    if not config.get("head_dim") and hidden % heads:
        raise ValueError(f"hidden_size {hidden} is no multiple of {heads} heads")
    shared: dict[str, Any] = {
        "hidden_size": hidden,
        "heads": heads,
        "kv_heads": whole(config, "num_key_value_heads", heads),
        "head_dim": whole(config, "head_dim", hidden // heads),
    }
    if "mlp_size" not in values:
        shared["mlp_size"] = whole(config, "intermediate_size")
    if "activation" not in values:
        shared["activation"] = activation(config["hidden_act"])
    if "norm" not in values:
        shared["norm"] = NormSpec(eps=float(config["rms_norm_eps"]))
    return LayerSpec(**shared | values)


def model_spec(
    config: Config,
    layers: Iterable[LayerSpec],
    names: Iterable[LayerNames],
    ropes: tuple[RopeSpec, ...],
    **values: Any,
) -> ModelSpec:
    """A model from the keys and names that most families use; ``values`` win over them."""
    shared: dict[str, Any] = {
        "architecture": config["architectures"][0],
        "layers": tuple(layers),
        "names": tuple(names),
        "ropes": ropes,
        "embedding": "model.embed_tokens",
        "final_norm": "model.norm",
        "head": "lm_head",
        "tied_head": tied(config, default=False),
        "vocabulary_size": whole(config, "vocab_size"),
    }
    if "context_length" not in values:
        limits = [rope.limit for rope in ropes if rope.limit is not None]
        shared["context_length"] = min([whole(config, "max_position_embeddings"), *limits])
    return ModelSpec(**shared | values)


def layer_names(
    index: int,
    norms: Mapping[str, str] = LLAMA_NORMS,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
) -> LayerNames:
    """Llama's names of layer ``index``; ``norms``: field of ``LayerNames`` -> name in the layer."""
    layer = f"model.layers.{index}"
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    return LayerNames(
        qkv=Matrix(modules=tuple(f"{attention}.{part}_proj" for part in "qkv"), bias=qkv_bias),
        o=Matrix(modules=(f"{attention}.o_proj",), bias=o_bias),
        mlps=(
            MlpNames(
                up=Matrix(modules=(f"{mlp}.gate_proj", f"{mlp}.up_proj"), bias=mlp_bias),
                down=Matrix(modules=(f"{mlp}.down_proj",), bias=mlp_bias),
            ),
        ),
        **{place: f"{layer}.{name}" for place, name in norms.items()},
    )


def activation(name: object) -> Activation:
    """The activation that transformers calls ``name``."""
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not served; served: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def tied(config: Config, *, default: bool) -> bool:
    """Whether the head is the embedding; ``default`` is the family's in transformers."""
    return bool(config.get("tie_word_embeddings", default))


def windows(config: Config, default: Callable[[int], bool]) -> list[int | None]:
    """Each layer's sliding window, from ``layer_types``; ``default``: does layer i have one?"""
    count = whole(config, "num_hidden_layers")
    types = config.get("layer_types")
    if types is None:
        types = [_LAYER_TYPES[default(i)] for i in range(count)]
    if len(types) != count:
        raise ValueError(f"{len(types)} layer_types for {count} layers")
    for name in types:
        if name not in _LAYER_TYPES:
            raise ValueError(f"layer type {name!r} is not served; served: {_LAYER_TYPES}")
    return [whole(config, "sliding_window") if n == _LAYER_TYPES[1] else None for n in types]


def sliding_window(config: Config) -> int | None:
    """The window of families that have one in all layers, or null."""
    return None if config["sliding_window"] is None else whole(config, "sliding_window")


def whole(config: Config, key: str, default: int | None = None) -> int:
    """An integer; where it is missing or null the default, or ``KeyError`` without one."""
    value = config.get(key)
    if value is None:
        if default is None:
            raise KeyError(key)
        return default
    if type(value) is not int:
        raise ValueError(f"{key} must be a whole number, not {value!r}")
    return value


def refuse(config: Config, **served: object) -> None:
    """Raises ``ValueError`` where a key that is present has another value than the served one."""
    for key, value in served.items():
        if config.get(key, value) not in (value, None):
            raise ValueError(f"{key} {config[key]!r} is not served")
