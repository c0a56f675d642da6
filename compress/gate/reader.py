"""Reads a recipe's ``gate``."""

from collections.abc import Callable
from typing import Any, cast

from yaml.nodes import Node, SequenceNode

from compress.gate.config import FEWEST_DOCUMENTS, MODES, Gate, Mode
from compress.recipe_nodes import RecipeNodes

_KEYS = tuple(Gate.__dataclass_fields__)


def read_gate(nodes: RecipeNodes, node: Node | None) -> Gate:
    """Raises ``CompressError`` that names the file and the line."""
    if node is None:
        return Gate()
    fields = nodes.fields(node, "gate", _KEYS)
    readers: dict[str, Callable[[Node, str], Any]] = {
        "max_kl": nodes.above_zero,
        "max_drop": nodes.share,
        "documents": nodes.positive,
        "length": nodes.positive,
        "restore": nodes.boolean,
        "speed": nodes.boolean,
        "data": lambda value, what: _paths(nodes, value, what),
        "tasks": lambda value, what: _paths(nodes, value, what),
    }
    found = {
        name: readers[name](value, f"gate.{name}")
        for name, value in fields.items()
        if name in readers
    }
    mode = "off"
    if "mode" in fields:
        mode = nodes.choice(fields["mode"], "gate.mode", MODES)
    if found.get("documents", FEWEST_DOCUMENTS) < FEWEST_DOCUMENTS:
        nodes.fail(fields["documents"], f"gate.documents must be at least {FEWEST_DOCUMENTS}")
    if found.get("length", 2) < 2:
        nodes.fail(fields["length"], "gate.length must be at least 2: one token predicts nothing")
    return Gate(mode=cast(Mode, mode), **found)


def _paths(nodes: RecipeNodes, node: Node, what: str) -> tuple[str, ...]:
    """One path or a list; relative ones start at the recipe's folder."""
    items = nodes.sequence(node, what) if isinstance(node, SequenceNode) else [node]
    return tuple(str(nodes.path.parent / nodes.text(item, what)) for item in items)
