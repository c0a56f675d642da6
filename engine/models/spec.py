"""What a decoder is, as plain numbers: a family's file fills this from its config.json."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One decoder layer: pre-norm, grouped-query attention, gated MLP."""

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_size: int
    norm_eps: float

    def __post_init__(self) -> None:
        sizes = (self.hidden_size, self.heads, self.kv_heads, self.head_dim, self.mlp_size)
        if min(sizes) < 1:
            raise ValueError("all sizes must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads are no multiple of {self.kv_heads} KV heads")
        if self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head size, not {self.head_dim}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNames:
    """Hugging Face names of a layer's modules, without ``.weight``."""

    q: str
    k: str
    v: str
    o: str
    gate: str
    up: str
    down: str
    attention_norm: str
    mlp_norm: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A whole model. ``names[i]`` are the modules of layer i."""

    architecture: str
    layer: LayerSpec
    names: tuple[LayerNames, ...]
    embedding: str
    final_norm: str
    head: str
    tied_head: bool
    vocabulary_size: int
    context_length: int
    rope_theta: float

    def __post_init__(self) -> None:
        if min(len(self.names), self.vocabulary_size, self.context_length) < 1:
            raise ValueError("layers, vocabulary and context must be at least 1")
