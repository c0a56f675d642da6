"""Turns a YAML file into a ``Recipe``: every key is known, or an error at its line."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from yaml.nodes import Node, SequenceNode

from compress.auto.reader import check_timed, read_auto
from compress.gate.reader import read_gate
from compress.methods import METHODS, OWL_SHIFT, PLANNED_METHODS
from compress.recipe import (
    GROUP_UNIT,
    LONGEST_INT8_GROUP,
    OPTIONS,
    SCHEMES,
    Calibration,
    KvCache,
    Modifier,
    Recipe,
    not_yet,
)
from compress.recipe_nodes import RecipeNodes
from compress.targets import pattern_error

_ALLOCATIONS = ("uniform", "owl")
_KEYS = ("version", "seed", "calibration", "head", "modifiers", "auto", "kv_cache", "gate")


def read(path: Path) -> Recipe:
    """Raises ``CompressError`` that names the file and the line."""
    nodes = RecipeNodes(path)
    return _Reader(nodes).recipe(nodes.root())


@dataclass(frozen=True, slots=True)
class _Reader:
    nodes: RecipeNodes

    def recipe(self, root: Node) -> Recipe:
        fields = self.nodes.fields(root, "the recipe", _KEYS)
        version = self._needed(root, fields, "version")
        if self.nodes.integer(version, "version") != 1:
            self.nodes.fail(version, "this program reads recipes of version 1")
        if "auto" in fields and "modifiers" in fields:
            self.nodes.fail(fields["modifiers"], "auto chooses the modifiers: remove one of both")
        auto = read_auto(self.nodes, fields["auto"]) if "auto" in fields else None
        modifiers = () if auto else self._modifiers(self._needed(root, fields, "modifiers"))
        calibrated = auto is not None or any(METHODS[one.type].calibrated for one in modifiers)
        recipe = Recipe(
            name=self.nodes.path.stem,
            version=1,
            seed=self.nodes.integer(fields["seed"], "seed") if "seed" in fields else 0,
            head=self._head(fields.get("head"), modifiers, auto=auto is not None),
            modifiers=modifiers,
            kv_cache=self._kv_cache(fields.get("kv_cache")),
            calibration=self._calibration(fields.get("calibration"), needed=calibrated),
            gate=read_gate(self.nodes, fields.get("gate")),
            auto=auto,
        )
        check_timed(self.nodes, fields, recipe)
        return recipe

    def _head(
        self, node: Node | None, modifiers: tuple[Modifier, ...], *, auto: bool
    ) -> Literal["int8", "keep"]:
        if node is None and auto:
            return "int8"
        if node is None:
            schemes = [SCHEMES[m.scheme] for m in modifiers if m.scheme is not None]
            return "int8" if any(activations == "int8" for _, activations in schemes) else "keep"
        return cast(Literal["int8", "keep"], self.nodes.choice(node, "head", ("int8", "keep")))

    def _calibration(self, node: Node | None, *, needed: bool) -> Calibration | None:
        if node is not None and not needed:
            self.nodes.fail(node, "no modifier here uses calibration: remove it")
        if node is None:
            return Calibration() if needed else None
        fields = self.nodes.fields(node, "calibration", ("source", "path", "samples", "length"))
        counts: dict[str, Any] = {
            name: self.nodes.positive(fields[name], f"calibration.{name}")
            for name in ("samples", "length")
            if name in fields
        }
        source = self._needed(node, fields, "source")
        kind = self.nodes.choice(source, "calibration.source", ("generate", "file"))
        if kind == "generate":
            if "path" in fields:
                self.nodes.fail(fields["path"], "the model generates the text: remove path")
            return Calibration(source="generate", **counts)
        paths = self._paths(self._needed(node, fields, "path"))
        return Calibration(source="file", paths=paths, **counts)

    def _paths(self, node: Node) -> tuple[str, ...]:
        """One path or a list; relative ones start at the recipe's folder."""
        items = self.nodes.sequence(node, "path") if isinstance(node, SequenceNode) else [node]
        names = [self.nodes.text(item, "calibration.path") for item in items]
        return tuple(str(self.nodes.path.parent / name) for name in names)

    def _kv_cache(self, node: Node | None) -> KvCache:
        fields = self.nodes.fields(node, "kv_cache", ("dtype",)) if node else {}
        if "dtype" not in fields:
            return KvCache()
        dtype = self.nodes.choice(fields["dtype"], "kv_cache.dtype", ("int8", "fp32"))
        return KvCache(dtype=cast(Literal["int8", "fp32"], dtype))

    def _modifiers(self, node: Node) -> tuple[Modifier, ...]:
        items = self.nodes.sequence(node, "modifiers")
        if not items:
            self.nodes.fail(node, "modifiers is empty: nothing would be compressed")
        return tuple(self._modifier(item) for item in items)

    def _modifier(self, node: Node) -> Modifier:
        values = {name: value for name, (_, value) in self.nodes.mapping(node, "modifier").items()}
        # The type is judged first: the keys of a planned type are known to nobody here.
        kind = self._available(
            self._needed(node, values, "type"), "type", tuple(METHODS), PLANNED_METHODS
        )
        options = OPTIONS[kind]
        self.nodes.fields(node, f"the {kind} modifier", ("type", "targets", "ignore", *options))
        found: dict[str, Any] = {
            name: self._patterns(values[name], name)
            for name in ("targets", "ignore")
            if name in values
        }
        if "scheme" in options:
            found |= self._rounding(node, kind, values)
        if "structure" in options:
            found |= self._pruning(node, values)
        if kind == "smoothquant":
            alpha = values.get("alpha")
            found["alpha"] = 0.5 if alpha is None else self.nodes.share(alpha, "alpha")
        return Modifier(type=kind, **found)

    def _rounding(self, node: Node, kind: str, values: dict[str, Node]) -> dict[str, Any]:
        scheme = self.nodes.choice(self._needed(node, values, "scheme"), "scheme", SCHEMES)
        found: dict[str, Any] = {"scheme": scheme, "scale": "absmax"}
        if SCHEMES[scheme][0] == 4:
            found |= {"group_size": GROUP_UNIT, "symmetric": True}
        for name in ("group_size", "symmetric"):
            if name in values and name not in found:
                self.nodes.fail(values[name], f"{scheme} has one symmetric scale per out-feature")
        if "group_size" in values:
            found["group_size"] = self._group_size(values["group_size"], scheme)
        if "symmetric" in values:
            found["symmetric"] = self.nodes.boolean(values["symmetric"], "symmetric")
        if "scale" in values:
            found["scale"] = self.nodes.choice(values["scale"], "scale", ("absmax", "mse"))
        if kind == "gptq":
            order = values.get("actorder")
            known = ("static", "none")
            found["actorder"] = (
                "static" if order is None else self.nodes.choice(order, "actorder", known)
            )
        if kind == "awq":
            clip = values.get("clip")
            found["clip"] = True if clip is None else self.nodes.boolean(clip, "clip")
        return found

    def _group_size(self, node: Node, scheme: str) -> int:
        size = self.nodes.positive(node, "group_size")
        if SCHEMES[scheme][1] == "int8":
            known = range(GROUP_UNIT, LONGEST_INT8_GROUP + 1, GROUP_UNIT)
            if size not in known:
                names = ", ".join(map(str, known))
                self.nodes.fail(node, f"{scheme} has no group_size {size}; there are {names}")
        elif size % GROUP_UNIT:
            self.nodes.fail(
                node, f"{scheme} has no group_size {size}; there are multiples of {GROUP_UNIT}"
            )
        return size

    def _pruning(self, node: Node, values: dict[str, Node]) -> dict[str, Any]:
        where = values.get("structure")
        structure = "unstructured" if where is None else self.nodes.text(where, "structure")
        where = values.get("allocation")
        if where is not None and self.nodes.choice(where, "allocation", _ALLOCATIONS) == "owl":
            return self._owl(node, values, where, structure)
        where = self._needed(node, values, "sparsity")
        if isinstance(where, SequenceNode):
            items = self.nodes.sequence(where, "sparsity")
            shares = tuple(self.nodes.share(item, "an item of sparsity") for item in items)
            return {"sparsity": shares, "structure": structure}
        return {"sparsity": self.nodes.share(where, "sparsity"), "structure": structure}

    def _owl(
        self, node: Node, values: dict[str, Node], where: Node, structure: str
    ) -> dict[str, Any]:
        if structure != "unstructured":
            self.nodes.fail(where, f"allocation owl: all layers have the same {structure}")
        share = self.nodes.share(self._needed(node, values, "sparsity"), "sparsity")
        if not OWL_SHIFT < share < 1 - OWL_SHIFT:
            self.nodes.fail(
                where, f"allocation owl needs a sparsity from {OWL_SHIFT} to {1 - OWL_SHIFT}"
            )
        return {"sparsity": share, "structure": structure, "allocation": "owl"}

    def _patterns(self, node: Node, what: str) -> tuple[str, ...]:
        patterns = []
        for item in self.nodes.sequence(node, what):
            patterns.append(self.nodes.text(item, f"an item of {what}"))
            if problem := pattern_error(patterns[-1]):
                self.nodes.fail(item, problem)
        return tuple(patterns)

    def _needed(self, node: Node, fields: dict[str, Node], name: str) -> Node:
        if name not in fields:
            self.nodes.fail(node, f"the key {name!r} is missing")
        return fields[name]

    def _available(
        self, node: Node, what: str, available: Collection[str], planned: Collection[str]
    ) -> str:
        value = self.nodes.text(node, what)
        if value in planned:
            self.nodes.fail(node, not_yet(f"{what}: {value}", available))
        return self.nodes.choice(node, what, available)
