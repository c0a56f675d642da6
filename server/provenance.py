"""Where the served weights came from: what the artefact's manifest says of itself."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from venturi.v1 import model_pb2 as pb


@dataclass(frozen=True, slots=True)
class Provenance:
    """The manifest ``venturi.json``, {} for an original model."""

    manifest: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: Path) -> "Provenance":
        """Reads the manifest where there is one."""
        path = folder / "venturi.json"
        return cls(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})

    def to_proto(self, checkpoint_format: str) -> pb.Provenance:
        """The contract's message; empty fields are unknown for an original model."""
        recipe = self.manifest.get("recipe", {})
        weights = {
            name: digest
            for name, digest in sorted(self.manifest.get("sources", {}).items())
            if name.endswith(".safetensors")
        }
        joined = hashlib.sha256(json.dumps(weights).encode()).hexdigest()
        single = next(iter(weights.values()), "")
        return pb.Provenance(
            recipe=recipe.get("name", ""),
            recipe_sha256=recipe.get("sha256", ""),
            weights_sha256=single if len(weights) <= 1 else joined,
            format=checkpoint_format,
            venturi_version=self.manifest.get("versions", {}).get("venturi", ""),
            artefact=self.manifest.get("key", ""),
        )

    def methods(self) -> dict[str, str]:
        """Compression method by module name."""
        return {row["name"]: row["method"] for row in self.manifest.get("layers", [])}
