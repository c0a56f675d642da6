"""Reads the small JSON files of a model folder."""

import json
from pathlib import Path
from typing import Any

from engine.errors import ModelLoadError


def read_optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, {} where there is no file. Raises ``ModelLoadError``."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object")
    return value
