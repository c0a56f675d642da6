"""What layers may become, and which of them are one choice. No tensors.

Linears that the engine fuses share a scheme: q, k, v; gate, up. So do the experts of a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from compress.plan import Plan
from compress.recipe import Modifier, Recipe

ORIGINAL = "original"


def _gptq(scheme: str, group_size: int | None = None, *, symmetric: bool = True) -> Modifier:
    return Modifier(
        type="gptq",
        scheme=scheme,
        group_size=group_size,
        symmetric=symmetric if group_size else None,
        scale="mse",
        actorder="static",
    )


# What the native kernels multiply with int8 activations.
CANDIDATES = {
    "w4a8 g128": _gptq("w4a8", 128),
    "w4a8 g128 zero points": _gptq("w4a8", 128, symmetric=False),
    "w4a8 g64": _gptq("w4a8", 64),
    "w4a8 g64 zero points": _gptq("w4a8", 64, symmetric=False),
    "w4a8 g32": _gptq("w4a8", 32),
    "w4a8 g32 zero points": _gptq("w4a8", 32, symmetric=False),
    "w8a8": _gptq("w8a8"),
}


@dataclass(frozen=True, slots=True)
class Group:
    """Linears of decoder layer ``layer`` that share a scheme."""

    layer: int
    part: str
    modules: tuple[str, ...]

    @property
    def name(self) -> str:
        """For people."""
        return f"layer {self.layer} {self.part}"


def tied_groups(plan: Plan) -> list[Group]:
    """Of all linears that ``plan`` treats, in the order of the model."""
    found = []
    for index, names in enumerate(plan.spec.names):
        parts = {
            "qkv": names.qkv.modules,
            "o": names.o.modules,
            "up": tuple(module for mlp in names.mlps for module in mlp.up.modules),
            "down": tuple(module for mlp in names.mlps for module in mlp.down.modules),
        }
        for part, modules in parts.items():
            if treated := tuple(module for module in modules if module in plan.treatments):
                found.append(Group(index, part, treated))
    return found


def uniform(recipe: Recipe, scheme: str) -> Recipe:
    """``recipe`` with one scheme for all layers that it may touch."""
    assert recipe.auto is not None
    modifier = replace(CANDIDATES[scheme], ignore=recipe.auto.ignore)
    return replace(recipe, modifiers=(modifier,), auto=None, frontier=None)


def modifiers(groups: Sequence[Group], schemes: Sequence[str]) -> tuple[Modifier, ...]:
    """One for each scheme that is used, with the names of its layers."""
    targets: dict[str, list[str]] = {}
    for group, scheme in zip(groups, schemes, strict=True):
        targets.setdefault(scheme, []).extend(group.modules)
    return tuple(
        replace(modifier, targets=tuple(targets[scheme]), ignore=())
        for scheme, modifier in CANDIDATES.items()
        if scheme in targets
    )
