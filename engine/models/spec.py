"""What a decoder is, as plain numbers and names: a family's file fills this from its config.json.

Imports no torch: ``compress`` finds a model's linear layers here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary positions of the first ``dim`` features of a head, named as in transformers.

    ``amplitude`` multiplies cosines and sines. ``limit`` is the longest context for which
    these frequencies hold, None where that is the model's own.
    """

    dim: int
    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_length: int = 1
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    ramp: tuple[float, float] = (0.0, 1.0)
    divisors: tuple[float, ...] = ()
    amplitude: float = 1.0
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"rotary positions need an even number of features, not {self.dim}")
        if self.divisors and len(self.divisors) != self.dim // 2:
            raise ValueError(f"{len(self.divisors)} rope factors do not fit {self.dim} features")
        if min(self.theta, self.factor, *self.divisors) <= 0:
            raise ValueError("rope_theta and rope factors must be positive")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("rope high_freq_factor must be above low_freq_factor")


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec:
    """RMSNorm or LayerNorm; ``offset`` is added to the stored weight, as Gemma has it."""

    eps: float
    kind: Literal["rms", "layer"] = "rms"
    bias: bool = False
    offset: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSpec:
    """Mixture of experts: the ``chosen`` likeliest of ``count`` for each token."""

    count: int
    chosen: int
    normalise: bool

    def __post_init__(self) -> None:
        if not 1 <= self.chosen <= self.count:
            raise ValueError(f"{self.chosen} of {self.count} experts cannot be chosen")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One decoder layer.

    ``window``: positions that a token attends to, its own among them. ``scale`` of q.k, None
    for 1 / sqrt(head_dim). ``alibi``: the largest exponent of ALiBi's slopes. ``rope``: index
    into ``ModelSpec.ropes``. ``qk_norm``: over each head or over all heads together.
    ``parallel``: attention and MLP read the same hidden state. ``mlp_size`` is an expert's.
    """

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_size: int
    norm: NormSpec
    activation: Activation = "silu"
    gated: bool = True
    experts: ExpertsSpec | None = None
    rope: int | None = None
    alibi: float | None = None
    window: int | None = None
    scale: float | None = None
    score_cap: float | None = None
    qkv_clip: float | None = None
    qk_norm: Literal["head", "all"] | None = None
    parallel: bool = False
    residual_scale: float = 1.0

    def __post_init__(self) -> None:
        sizes = (self.hidden_size, self.heads, self.kv_heads, self.head_dim, self.mlp_size)
        if min(sizes) < 1:
            raise ValueError("all sizes must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads are no multiple of {self.kv_heads} KV heads")
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window of {self.window} positions")
        if self.alibi is not None and self.score_cap is not None:
            raise ValueError("ALiBi with capped scores is not served")


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A linear layer: modules of the checkpoint whose out-features follow each other.

    ``transposed``: a module stores its weight as [K, N], as GPT-2's Conv1D does.
    ``interleaved``: out-features lie as [heads, (q, k, v), head_dim], of so many heads.
    ``router``: it chooses experts, and is never rounded.
    """

    modules: tuple[str, ...]
    bias: bool = False
    transposed: bool = False
    interleaved: int | None = None
    router: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpNames:
    """``up`` is gate and up where the MLP is gated."""

    up: Matrix
    down: Matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNames:
    """Hugging Face names of a layer's modules, without ``.weight``; None: there is none.

    ``*_norm`` norms what attention or MLP read, ``*_out_norm`` what they give, ``*_sum_norm``
    the hidden state after it was added. ``mlps`` are the experts where there is a router.
    """

    qkv: Matrix
    o: Matrix
    mlps: tuple[MlpNames, ...]
    router: str | None = None
    attention_norm: str | None = None
    attention_out_norm: str | None = None
    attention_sum_norm: str | None = None
    mlp_norm: str | None = None
    mlp_out_norm: str | None = None
    mlp_sum_norm: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None

    def matrices(self) -> Iterator[Matrix]:
        """The linear layers that may be compressed: all but the router."""
        yield self.qkv
        yield self.o
        for mlp in self.mlps:
            yield mlp.up
            yield mlp.down


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A whole model. ``names[i]`` are the modules of ``layers[i]``.

    ``positions`` names a table of learned positions, of which the first ``position_offset``
    rows are not used. Logits are divided by ``logit_divisor``, then capped softly.
    ``optional_prefix``: what all names begin with, and some checkpoints leave out.
    """

    architecture: str
    layers: tuple[LayerSpec, ...]
    names: tuple[LayerNames, ...]
    embedding: str
    final_norm: str | None
    head: str
    tied_head: bool
    vocabulary_size: int
    context_length: int
    ropes: tuple[RopeSpec, ...] = ()
    embedding_scale: float = 1.0
    positions: str | None = None
    position_offset: int = 0
    logit_divisor: float = 1.0
    logit_cap: float | None = None
    optional_prefix: str = ""

    def __post_init__(self) -> None:
        if min(len(self.layers), self.vocabulary_size, self.context_length) < 1:
            raise ValueError("layers, vocabulary and context must be at least 1")
        if len(self.layers) != len(self.names):
            raise ValueError(f"{len(self.layers)} layers with {len(self.names)} names")
        for rope in self.ropes:
            if rope.dim > self.layer.head_dim:
                raise ValueError(f"{rope.dim} rotary features do not fit {self.layer.head_dim}")

    @property
    def layer(self) -> LayerSpec:
        """The first layer: heads and sizes of the hidden state are those of all."""
        return self.layers[0]

    def linears(self) -> dict[str, Matrix]:
        """Module name -> its matrix, for all linear layers that may be compressed."""
        return {
            module: matrix
            for names in self.names
            for matrix in names.matrices()
            for module in matrix.modules
        }
