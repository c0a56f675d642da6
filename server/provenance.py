"""Where the served weights came from: what the artefact's manifest says of itself."""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.client.files import read_optional_json
from engine.errors import ModelLoadError
from server.monitoring import EntropyReference
from venturi.v1 import model_pb2 as pb


@dataclass(frozen=True, slots=True)
class Provenance:
    """The manifest ``venturi.json``, {} for an original model."""

    manifest: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: Path) -> "Provenance":
        """Reads the manifest where there is one. Raises ``ModelLoadError``."""
        return cls(read_optional_json(folder / "venturi.json"))

    def check_sizes(self, folder: Path) -> None:
        """Raises ``ModelLoadError`` where weights have another size than they were written with."""
        for name, size in self._object("files").items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else 0
            if name.endswith(".safetensors") and found != size:
                raise ModelLoadError(
                    f"{path} has {found} bytes, not {size} as when it was written: compress again"
                )

    def to_proto(self, checkpoint_format: str) -> pb.Provenance:
        """The contract's message; empty fields are unknown for an original model."""
        recipe = self._object("recipe")
        weights = {
            name: digest
            for name, digest in sorted(self._object("sources").items())
            if name.endswith(".safetensors")
        }
        joined = hashlib.sha256(json.dumps(weights).encode()).hexdigest()
        single = next(iter(weights.values()), "")
        return pb.Provenance(
            recipe=recipe.get("name", ""),
            recipe_sha256=recipe.get("sha256", ""),
            weights_sha256=single if len(weights) <= 1 else joined,
            format=checkpoint_format,
            venturi_version=self._object("versions").get("venturi", ""),
            artefact=self.manifest.get("key", ""),
        )

    def verdict(self) -> tuple[str, str]:
        """What the gate said when the artefact was made, and why; empty where none did."""
        found = self._object("verdict")
        return str(found.get("outcome", "")), str(found.get("line", ""))

    def entropy(self) -> EntropyReference | None:
        """Of the original's output, where the artefact was evaluated."""
        found = self._object("reference_entropy")
        try:
            mean = float(found["mean"])
        except (LookupError, TypeError, ValueError):
            return None
        return EntropyReference(mean=mean) if math.isfinite(mean) else None

    def methods(self) -> dict[str, str]:
        """Compression method by module name."""
        rows = self.manifest.get("layers")
        layers = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        return {str(row.get("name")): str(row.get("method", "")) for row in layers}

    def _object(self, key: str) -> dict[str, Any]:
        value = self.manifest.get(key)
        return value if isinstance(value, dict) else {}
