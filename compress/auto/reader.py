"""Reads a recipe's ``auto``."""

import re
from collections.abc import Mapping
from typing import Any

from yaml.nodes import Node

from compress.auto.config import BUDGETS, Auto
from compress.recipe import Recipe
from compress.recipe_nodes import RecipeNodes
from compress.targets import pattern_error

_KEYS = (*BUDGETS, "time_budget", "swaps", "ignore")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(|k|M|G|Ki|Mi|Gi)B?")


def read_auto(nodes: RecipeNodes, node: Node) -> Auto:
    """Raises ``CompressError`` that names the file and the line."""
    fields = nodes.fields(node, "auto", _KEYS)
    given = [name for name in BUDGETS if name in fields]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        nodes.fail(node, f"auto needs exactly one of {', '.join(BUDGETS)}; it has {found}")
    budget, value = given[0], fields[given[0]]
    read = _size if budget == "bytes" else RecipeNodes.above_zero
    options: dict[str, Any] = {}
    if "time_budget" in fields:
        options["time_budget"] = nodes.above_zero(fields["time_budget"], "auto.time_budget")
    if "swaps" in fields:
        options["swaps"] = nodes.integer(fields["swaps"], "auto.swaps")
    if "ignore" in fields:
        options["ignore"] = _patterns(nodes, fields["ignore"])
    return Auto(budget=budget, limit=read(nodes, value, f"auto.{budget}"), **options)


def check_timed(nodes: RecipeNodes, fields: Mapping[str, Node], recipe: Recipe) -> None:
    """Refuses what the step that a speed is made from does not have.

    ``fields`` are those of ``recipe``. Raises ``CompressError``.
    """
    if recipe.auto is None or recipe.auto.budget != "tokens_per_second":
        return
    what = "auto.tokens_per_second is timed with an int8 head and KV cache"
    if recipe.head != "int8":
        nodes.fail(fields["head"], f"{what}: remove head, or ask for bits or bytes")
    if recipe.kv_cache.dtype != "int8":
        nodes.fail(fields["kv_cache"], f"{what}: remove kv_cache, or ask for bits or bytes")


def _size(nodes: RecipeNodes, node: Node, what: str) -> float:
    """Bytes: a number, or one with a unit."""
    text = nodes.text(node, what)
    match = _SIZE.fullmatch(text)
    if match is None or float(match[1]) == 0:
        nodes.fail(node, f"{what} must be a size such as 500M or 1.5Gi, not {text!r}")
    return float(match[1]) * _UNITS[match[2]]


def _patterns(nodes: RecipeNodes, node: Node) -> tuple[str, ...]:
    patterns = []
    for item in nodes.sequence(node, "auto.ignore"):
        patterns.append(nodes.text(item, "an item of auto.ignore"))
        if problem := pattern_error(patterns[-1]):
            nodes.fail(item, problem)
    return tuple(patterns)
