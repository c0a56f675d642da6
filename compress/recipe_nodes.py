"""Reads typed values from a YAML file's nodes, so that each error names the file and the line."""

import difflib
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from compress.errors import CompressError

_INT_TAG = "tag:yaml.org,2002:int"


@dataclass(frozen=True, slots=True)
class RecipeNodes:
    """Accessors over the nodes of one file. Each raises ``CompressError`` at a wrong node.

    ``what`` names the value in messages, such as ``kv_cache.dtype``.
    """

    path: Path

    def root(self) -> Node:
        """The file's only document."""
        try:
            node = yaml.compose(self.path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except OSError as error:
            raise CompressError(f"{self.path} cannot be read: {error.strerror}") from error
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            message = f"{self.path}:{line}: not valid YAML: {error.problem}"
            raise CompressError(message) from error
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise CompressError(f"{self.path} is not a YAML text file in UTF-8") from error
        if node is None:
            raise CompressError(f"{self.path} is empty: a recipe needs at least its modifiers")
        return node

    def fail(self, node: Node, message: str) -> NoReturn:
        """Raises ``CompressError`` at the node's line."""
        raise CompressError(f"{self.path}:{node.start_mark.line + 1}: {message}")

    def mapping(self, node: Node, what: str) -> dict[str, tuple[Node, Node]]:
        """Key -> (key node, value node); a key given twice is an error."""
        if not isinstance(node, MappingNode):
            self.fail(node, f"{what} must be a mapping of keys to values")
        found: dict[str, tuple[Node, Node]] = {}
        for key, value in node.value:
            name = self.text(key, f"a key of {what}")
            if name in found:
                self.fail(key, f"{what} has the key {name!r} twice")
            found[name] = (key, value)
        return found

    def fields(self, node: Node, what: str, known: Collection[str]) -> dict[str, Node]:
        """As ``mapping``, values only; a key that is not in ``known`` is an error."""
        found = self.mapping(node, what)
        for name, (key, _) in found.items():
            if name not in known:
                self.fail(key, f"{what} has no key {name!r}; {suggest(name, known)}")
        return {name: value for name, (_, value) in found.items()}

    def text(self, node: Node, what: str) -> str:
        """A scalar as it is written: ``off`` stays a word, whatever YAML 1.1 makes of it."""
        if not isinstance(node, ScalarNode) or not node.value:
            self.fail(node, f"{what} must be one word or text")
        return str(node.value)

    def choice(self, node: Node, what: str, known: Collection[str]) -> str:
        """One of the words in ``known``."""
        value = self.text(node, what)
        if value not in known:
            self.fail(node, f"{what} cannot be {value!r}; {suggest(value, known)}")
        return value

    def integer(self, node: Node, what: str) -> int:
        """A decimal whole number that is not negative."""
        value = self.text(node, what)
        if node.tag != _INT_TAG or not (value.isascii() and value.isdecimal()):
            self.fail(node, f"{what} must be a whole number from 0 on, not {value!r}")
        return int(value)

    def positive(self, node: Node, what: str) -> int:
        """As ``integer``, from 1 on."""
        value = self.integer(node, what)
        if value < 1:
            self.fail(node, f"{what} must be at least 1")
        return value

    def share(self, node: Node, what: str) -> float:
        """A number from 0 to 1."""
        value = self.text(node, what)
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not 0 <= number <= 1:
            self.fail(node, f"{what} must be a number from 0 to 1, not {value!r}")
        return number

    def above_zero(self, node: Node, what: str) -> float:
        """A finite number above 0."""
        value = self.text(node, what)
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if not 0 < number < math.inf:
            self.fail(node, f"{what} must be a number above 0, not {value!r}")
        return number

    def boolean(self, node: Node, what: str) -> bool:
        """``true`` or ``false``."""
        return self.choice(node, what, ("true", "false")) == "true"

    def sequence(self, node: Node, what: str) -> list[Node]:
        """The items of a list."""
        if not isinstance(node, SequenceNode):
            self.fail(node, f"{what} must be a list")
        return list(node.value)


def suggest(name: str, known: Collection[str]) -> str:
    """The nearest known name, or all of them where none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
