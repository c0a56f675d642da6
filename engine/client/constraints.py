"""Structured output as a request asks for it: what can be told without compiling it."""

import json
from importlib.util import find_spec

from engine.errors import InvalidRequest, NotServed
from engine.types import Constraint

MAX_CHARACTERS = 1 << 16
MAX_VALUES = 1024


def choice_constraint(values: list[str]) -> Constraint:
    """The output is one of ``values``. Raises ``InvalidRequest``."""
    if not 1 <= len(values) <= MAX_VALUES or not all(values):
        raise InvalidRequest(
            "structured.choice", f"must have 1 to {MAX_VALUES} values, none of them empty"
        )
    return Constraint(kind="choice", text=json.dumps(values))


def check_constraint(constraint: Constraint) -> None:
    """Raises ``InvalidRequest``, or ``NotServed`` where what compiles it is not installed."""
    field = f"structured.{constraint.kind}"
    if not 1 <= len(constraint.text) <= MAX_CHARACTERS:
        raise InvalidRequest(field, f"must have 1 to {MAX_CHARACTERS} characters")
    if find_spec("llguidance") is None:
        raise NotServed(field, "this server has no llguidance: pip install llguidance")
