"""What is to be done to a model: a frozen ``Recipe``, read from YAML or by a preset's name.

A preset is a recipe file in ``presets``. What is planned but not available in this version is
refused by name rather than ignored.
"""

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, cast

from yaml.nodes import Node

from compress.errors import CompressError
from compress.methods import METHODS, PLANNED_METHODS
from compress.recipe_nodes import RecipeNodes, suggest
from compress.targets import pattern_error

PRESETS = Path(__file__).with_name("presets")
SCHEMES = ("w8a8",)
_PLANNED_PRESETS = (
    "w8a16", "w4a16", "w4a16-rtn", "w4a16-gptq", "w4a16-awq", "w4a8", "fp8",
    "sparse24-w8a8", "sparse50-w8a8", "sparse50-w4a8",
)  # fmt: skip
_PLANNED_SCHEMES = ("w8a16", "w4a16", "w4a8", "fp8")
_PLANNED_GATE_KEYS = ("max_kl", "max_drop", "tasks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Modifier:
    """One step: method ``type`` brings the linear layers that match to ``scheme``."""

    type: str
    scheme: str
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ("lm_head",)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCache:
    """What the engine keeps keys and values in."""

    dtype: Literal["int8", "fp32"] = "int8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Whether the artefact must pass an evaluation before it is published."""

    mode: Literal["off"] = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A resolved recipe. ``name`` is the preset's or the file's and changes nothing.

    ``head`` int8 is quantised when the engine loads the artefact, which keeps the original
    dtype. ``calibration`` stays None: no available method uses any.
    """

    name: str = field(compare=False)
    version: int
    seed: int
    head: Literal["int8", "keep"]
    modifiers: tuple[Modifier, ...]
    kv_cache: KvCache
    calibration: None = None
    gate: Gate

    def canonical_json(self) -> str:
        """The same text for the same artefact: keys sorted; without the name and the gate."""
        fields = asdict(self)
        del fields["name"], fields["gate"]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    def sha256(self) -> str:
        """Hex digest of ``canonical_json``."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()


def presets() -> list[str]:
    """Names that ``resolve`` knows: one for each file in the presets folder."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def resolve(spec: str) -> Recipe:
    """The recipe of a preset's name or of a path to a YAML file.

    Raises:
        CompressError: no such preset or file, or the file is not a valid recipe.
    """
    if spec in presets():
        return load(PRESETS / f"{spec}.yaml")
    path = Path(spec)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return load(path)
    if spec in _PLANNED_PRESETS:
        raise CompressError(_not_yet(f"recipe {spec}", presets()))
    raise CompressError(
        f"there is no recipe {spec!r}; {suggest(spec, presets())} (or the path of a YAML file)"
    )


def load(path: Path) -> Recipe:
    """Reads a recipe file. Raises ``CompressError`` that names the file and the line."""
    nodes = RecipeNodes(path)
    return _Reader(nodes).recipe(nodes.root())


def _not_yet(what: str, available: Collection[str]) -> str:
    return f"{what} is not available yet; available: {', '.join(available)}"


@dataclass(frozen=True, slots=True)
class _Reader:
    nodes: RecipeNodes

    def recipe(self, root: Node) -> Recipe:
        known = ("version", "seed", "calibration", "head", "modifiers", "kv_cache", "gate")
        fields = self.nodes.fields(root, "the recipe", known)
        version = self._needed(root, fields, "version")
        if self.nodes.integer(version, "version") != 1:
            self.nodes.fail(version, "this program reads recipes of version 1")
        if "calibration" in fields:
            self.nodes.fail(fields["calibration"], "no modifier here uses calibration: remove it")
        return Recipe(
            name=self.nodes.path.stem,
            version=1,
            seed=self.nodes.integer(fields["seed"], "seed") if "seed" in fields else 0,
            head=self._head(fields.get("head")),
            modifiers=self._modifiers(self._needed(root, fields, "modifiers")),
            kv_cache=self._kv_cache(fields.get("kv_cache")),
            gate=self._gate(fields.get("gate")),
        )

    def _head(self, node: Node | None) -> Literal["int8", "keep"]:
        if node is None:
            return "int8"
        return cast(Literal["int8", "keep"], self.nodes.choice(node, "head", ("int8", "keep")))

    def _kv_cache(self, node: Node | None) -> KvCache:
        fields = self.nodes.fields(node, "kv_cache", ("dtype",)) if node else {}
        if "dtype" not in fields:
            return KvCache()
        dtype = self.nodes.choice(fields["dtype"], "kv_cache.dtype", ("int8", "fp32"))
        return KvCache(dtype=cast(Literal["int8", "fp32"], dtype))

    def _gate(self, node: Node | None) -> Gate:
        fields = self.nodes.fields(node, "gate", ("mode", *_PLANNED_GATE_KEYS)) if node else {}
        if "mode" in fields:
            self._available(fields["mode"], "gate.mode", ("off",), ("enforce", "warn"))
        for name in _PLANNED_GATE_KEYS:
            if name in fields:
                self.nodes.fail(fields[name], f"gate.{name} is of no use while gate.mode is off")
        return Gate()

    def _modifiers(self, node: Node) -> tuple[Modifier, ...]:
        items = self.nodes.sequence(node, "modifiers")
        if not items:
            self.nodes.fail(node, "modifiers is empty: nothing would be compressed")
        return tuple(self._modifier(item) for item in items)

    def _modifier(self, node: Node) -> Modifier:
        values = {name: value for name, (_, value) in self.nodes.mapping(node, "modifier").items()}
        # The type is judged first: the keys of a planned type are known to nobody here.
        kind = self._available(
            self._needed(node, values, "type"),
            "type",
            ("rtn",),
            {*METHODS, *PLANNED_METHODS} - {"rtn"},
        )
        scheme = self._available(
            self._needed(node, values, "scheme"), "scheme", SCHEMES, _PLANNED_SCHEMES
        )
        self.nodes.fields(node, f"the {kind} modifier", ("type", "scheme", "targets", "ignore"))
        patterns = {
            name: self._patterns(values[name], name)
            for name in ("targets", "ignore")
            if name in values
        }
        return Modifier(type=kind, scheme=scheme, **patterns)

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
            self.nodes.fail(node, _not_yet(f"{what}: {value}", available))
        return self.nodes.choice(node, what, available)
