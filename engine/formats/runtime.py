"""What an artefact asks of the engine beyond its tensors: ``runtime`` in venturi.json."""

from dataclasses import asdict, dataclass
from pathlib import Path

from engine.errors import ModelLoadError
from engine.formats.checkpoint import read_json

MANIFEST_NAME = "venturi.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """``head``: ``int8`` (quantised at load) or ``keep``; ``kv_dtype``: ``int8`` or ``fp32``;
    ``activations`` of packed weights: ``int8``, or ``float``, for which they are unpacked.
    """

    head: str = "keep"
    kv_dtype: str = "int8"
    activations: str = "float"

    def __post_init__(self) -> None:
        if self.head not in ("int8", "keep") or self.kv_dtype not in ("int8", "fp32"):
            raise ValueError(f"runtime asks for head {self.head!r}, KV cache {self.kv_dtype!r}")
        if self.activations not in ("int8", "float"):
            raise ValueError(f"runtime asks for activations {self.activations!r}")


def to_json(runtime: Runtime) -> dict[str, str]:
    """The manifest's ``runtime`` object."""
    return asdict(runtime)


def read_runtime(folder: Path) -> Runtime:
    """Inverse of ``to_json``; the defaults where the folder has no manifest."""
    path = folder / MANIFEST_NAME
    if not path.exists():
        return Runtime()
    try:
        return Runtime(**read_json(path).get("runtime", {}))
    except (TypeError, ValueError) as error:
        raise ModelLoadError(f"{path}: this version does not know its runtime: {error}") from error
