"""Model families: architecture name in config.json -> the module that maps it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.errors import ModelLoadError
from engine.models import llama
from engine.models.spec import ModelSpec

FAMILIES: dict[str, Callable[[dict[str, Any]], ModelSpec]] = {"LlamaForCausalLM": llama.spec}


def model_spec(folder: Path, config: dict[str, Any]) -> ModelSpec:
    """The spec of the model in ``folder``. Raises ``ModelLoadError``."""
    names = config.get("architectures") or ["(none)"]
    family = FAMILIES.get(str(names[0])) if isinstance(names, list) else None
    if family is None:
        raise ModelLoadError(
            f"{folder / 'config.json'} names the architecture {names}; "
            f"supported: {', '.join(FAMILIES)}"
        )
    try:
        return family(config)
    except KeyError as error:
        raise ModelLoadError(f"{folder / 'config.json'} lacks {error}") from error
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise ModelLoadError(f"{folder / 'config.json'}: {error}") from error
