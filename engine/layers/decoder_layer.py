"""One decoder layer, composed of single kernels: ``(hidden, step) -> hidden``."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from engine.layers.attention import AttentionWeights, Step, make_attention
from engine.layers.mlp import Mlp, MlpWeights, make_mlp
from engine.layers.norm import Norm, identity
from engine.models.spec import LayerSpec

LayerFn = Callable[[Tensor, Step], Tensor]


@dataclass(frozen=True, slots=True)
class Branch:
    """Norms around attention or MLP: of what it reads, what it gives, and of the sum."""

    norm: Norm = identity
    out_norm: Norm = identity
    sum_norm: Norm = identity


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """A layer's matrices and norms; ``mlp`` is made already where it has experts."""

    attention: AttentionWeights
    attention_norms: Branch
    mlp: MlpWeights | Mlp
    mlp_norms: Branch


def compose(
    spec: LayerSpec, weights: LayerWeights, index: int, rope_dim: int, backend: str
) -> LayerFn:
    """The layer as a function. ``index`` is its place in the KV cache."""
    attention = make_attention(spec, weights.attention, index, rope_dim, backend)
    mlp = weights.mlp
    if isinstance(mlp, MlpWeights):
        mlp = make_mlp(spec, mlp, backend)
    a, m = weights.attention_norms, weights.mlp_norms
    scaled = _scaled(spec.residual_scale)

    def sequential(hidden_TK: Tensor, step: Step) -> Tensor:
        out_TK = a.out_norm(attention(a.norm(hidden_TK), step))
        hidden_TK = a.sum_norm(hidden_TK + scaled(out_TK))
        return m.sum_norm(hidden_TK + scaled(m.out_norm(mlp(m.norm(hidden_TK)))))

    def parallel(hidden_TK: Tensor, step: Step) -> Tensor:
        return hidden_TK + attention(a.norm(hidden_TK), step) + mlp(m.norm(hidden_TK))

    return parallel if spec.parallel else sequential


def _scaled(factor: float) -> Callable[[Tensor], Tensor]:
    return identity if factor == 1.0 else lambda x_TK: x_TK * factor
