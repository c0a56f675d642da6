"""One decoder layer, composed of single kernels: ``(hidden, step) -> hidden``."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from engine.layers.attention import AttentionWeights, Step, make_attention
from engine.layers.linear import Linear, Wrapped
from engine.layers.mlp import ExpertsWeights, MlpWeights, make_mlp
from engine.layers.norm import Norm, identity
from engine.models.spec import LayerSpec

LayerFn = Callable[[Tensor, Step], Tensor]
# Is told that a linear layer reads [M, K].
Observe = Callable[[Linear, Tensor], None]


@dataclass(frozen=True, slots=True)
class Branch:
    """Norms around attention or MLP: of what it reads, what it gives, and of the sum."""

    norm: Norm = identity
    out_norm: Norm = identity
    sum_norm: Norm = identity


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """A layer's matrices and norms."""

    attention: AttentionWeights
    attention_norms: Branch
    mlp: MlpWeights | ExpertsWeights
    mlp_norms: Branch

    def observed(self, observe: Observe) -> "LayerWeights":
        """The same, where ``observe`` sees what each matrix reads, but for routers."""

        def seen(mlp: MlpWeights) -> MlpWeights:
            return MlpWeights(up=_Observed(mlp.up, observe), down=_Observed(mlp.down, observe))

        attention, mlp = self.attention, self.mlp
        qkv, o = _Observed(attention.qkv, observe), _Observed(attention.o, observe)
        if isinstance(mlp, ExpertsWeights):
            mlp = replace(mlp, experts=tuple(map(seen, mlp.experts)))
        else:
            mlp = seen(mlp)
        return replace(self, attention=replace(attention, qkv=qkv, o=o), mlp=mlp)


@dataclass(frozen=True, slots=True)
class _Observed(Wrapped):
    observe: Observe

    def __call__(self, x_MK: Tensor) -> Tensor:
        self.observe(self.linear, x_MK)
        return self.linear(x_MK)


def compose(
    spec: LayerSpec, weights: LayerWeights, index: int, rope_dim: int, backend: str
) -> LayerFn:
    """The layer as a function. ``index`` is its place in the KV cache."""
    attention = make_attention(spec, weights.attention, index, rope_dim, backend)
    mlp = make_mlp(spec, weights.mlp, backend)
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
