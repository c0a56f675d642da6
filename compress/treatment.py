"""What a recipe's modifiers do to one linear layer together. Imports no torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from compress.errors import CompressError
from compress.methods import METHODS
from compress.recipe import SCHEMES, Modifier

INT_QUANTIZED = "int-quantized"
FLOAT_QUANTIZED = "float-quantized"
PACK_QUANTIZED = "pack-quantized"


@dataclass(frozen=True, slots=True, kw_only=True)
class Treatment:
    """Scalings, then pruning, then rounding; ``bits`` and ``format`` None: not rounded.

    ``sparsity`` is that of this layer; ``sparse`` is ``unstructured`` or ``2:4`` where zeros are
    left out of the file, which is where that is smaller. ``fell_back``: groups do not divide the
    rows, which have one scale and 8 bits instead.
    """

    scalings: tuple[Modifier, ...] = ()
    pruner: Modifier | None = None
    sparsity: float | None = None
    quantiser: Modifier | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool = True
    format: str | None = None
    fell_back: bool = False
    sparse: Literal["unstructured", "2:4"] | None = None

    @property
    def modifiers(self) -> tuple[Modifier, ...]:
        """All of them, in order."""
        last = [one for one in (self.pruner, self.quantiser) if one is not None]
        return (*self.scalings, *last)

    @property
    def scheme_key(self) -> tuple[object, ...]:
        """Equal for layers that are stored alike."""
        return (self.format, self.bits, self.group_size, self.symmetric, self.sparse)

    @property
    def storage(self) -> str:
        """For people."""
        if self.format is None:
            return "dense"
        where = f"in groups of {self.group_size}" if self.group_size else "per channel"
        dense = f"{self.format} {self.bits} bit {where}"
        return dense if self.sparse is None else f"{dense}, {self.sparse} mask and kept values"

    @property
    def execution(self) -> str:
        """What is asked of the engine."""
        if self.quantiser is None:
            return "float"
        assert self.quantiser.scheme is not None
        if self.format == FLOAT_QUANTIZED:
            return "float8_e4m3 x float8_e4m3"
        if SCHEMES[self.quantiser.scheme][1] == "float":
            return f"int{self.bits} x float32"
        return f"int{self.bits} x int8"


def combine(
    name: str, modifiers: Sequence[Modifier], columns: int, where: tuple[int, int]
) -> Treatment:
    """The treatment of the linear ``name`` with ``columns`` in-features.

    ``where``: the index of its decoder layer, and their number. Raises ``CompressError``.
    """
    scalings: list[Modifier] = []
    pruner = quantiser = None
    for modifier in modifiers:
        kinds = METHODS[modifier.type].kinds
        if quantiser is not None and "quantiser" in kinds:
            raise CompressError(f"two modifiers target {name}: one layer, one scheme")
        if pruner is not None and "pruner" in kinds:
            raise CompressError(f"two modifiers prune {name}: one layer, one sparsity")
        if quantiser is not None or (pruner is not None and "quantiser" not in kinds):
            raise CompressError(
                f"{name}: {modifier.type} comes too late: first scale, then prune, then round"
            )
        if "scaling" in kinds:
            scalings.append(modifier)
        if "pruner" in kinds:
            pruner = modifier
        if "quantiser" in kinds:
            quantiser = modifier
    if scalings and pruner is not None and quantiser in scalings:
        raise CompressError(f"{name}: awq scales before it rounds: prune without it")
    fields = {} if quantiser is None else _rounding(quantiser, columns)
    sparsity = None if pruner is None else _sparsity(name, pruner, columns, where)
    integers = fields.get("format") != FLOAT_QUANTIZED
    sparse = _sparse(pruner, sparsity, fields.get("bits"), columns) if integers else None
    return Treatment(
        scalings=tuple(scalings), pruner=pruner, sparsity=sparsity, quantiser=quantiser,
        sparse=sparse, **fields,
    )  # fmt: skip


def _rounding(quantiser: Modifier, columns: int) -> dict[str, Any]:
    assert quantiser.scheme is not None
    bits = SCHEMES[quantiser.scheme][0]
    if bits == 8:
        kinds = {"w8a8": INT_QUANTIZED, "w8a16": PACK_QUANTIZED, "fp8": FLOAT_QUANTIZED}
        return {"bits": 8, "format": kinds[quantiser.scheme]}
    assert quantiser.group_size is not None
    if columns % quantiser.group_size:
        return {"bits": 8, "format": PACK_QUANTIZED, "fell_back": True}
    return {
        "bits": bits, "format": PACK_QUANTIZED, "group_size": quantiser.group_size,
        "symmetric": bool(quantiser.symmetric),
    }  # fmt: skip


def _sparse(
    pruner: Modifier | None, share: float | None, bits: int | None, columns: int
) -> Literal["unstructured", "2:4"] | None:
    """How zeros are left out: where what is saved is more than the mask and row offsets take."""
    if pruner is None or bits is None or share is None:
        return None
    if pruner.structure == "2:4":
        return "2:4"
    return "unstructured" if bits * share > 1 + 64 / columns else None


def _sparsity(name: str, pruner: Modifier, columns: int, where: tuple[int, int]) -> float:
    share, (index, count) = pruner.sparsity, where
    if isinstance(share, tuple):
        if len(share) != count:
            raise CompressError(f"sparsity has {len(share)} levels for {count} decoder layers")
        share = share[index]
    assert share is not None
    assert pruner.structure is not None
    if not 0 < share < 1:
        raise CompressError(f"{name}: a sparsity of {share} lies not between 0 and 1")
    match = re.fullmatch(r"(\d+):(\d+)", pruner.structure)
    if pruner.structure == "unstructured":
        return share
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise CompressError(f"structure {pruner.structure!r} is neither unstructured nor N:M")
    kept, of = int(match[1]), int(match[2])
    if abs(1 - kept / of - share) > 1e-9:
        raise CompressError(f"structure {pruner.structure} is no sparsity of {share}")
    if columns % of:
        raise CompressError(
            f"{pruner.structure} does not divide the {columns} in-features of {name}: "
            "name it under ignore"
        )
    return share
