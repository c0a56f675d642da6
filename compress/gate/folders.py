"""Whether an artefact is as it was written, and a folder the one that it was made of: by hashes
in its manifest. Folders of other programs have none. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.sources import MANIFEST_NAME, HashMemo, hash_sources, is_model_file
from engine.client.files import read_optional_json


def check_intact(artefact: Path, memo: HashMemo) -> None:
    """Raises ``CompressError`` where a model file has changed since ``artefact`` was written."""
    written = _hashes(artefact, "hashes")
    if not written:
        return
    found = hash_sources(artefact, memo).hashes
    for name, wanted in sorted(written.items()):
        if found.get(name) != wanted:
            raise CompressError(
                f"{artefact / name} changed since it was written: remove {artefact} and compress "
                "again"
            )


def check_original(artefact: Path, original: Path, memo: HashMemo, option: str) -> bool:
    """Whether it is known that ``artefact`` was made of ``original``; False: there are no hashes.

    Raises ``CompressError`` where it was not; ``option`` names the original.
    """
    wanted = {k: v for k, v in _hashes(artefact, "sources").items() if is_model_file(k)}
    if not wanted:
        return False
    found = hash_sources(original, memo).hashes
    for name, digest in sorted(wanted.items()):
        if found.get(name) != digest:
            how = "differs" if name in found else "is missing"
            raise CompressError(
                f"{artefact} was not made of {original}, where {name} {how}: name its own "
                f"original with {option}"
            )
    return True


def _hashes(artefact: Path, key: str) -> Mapping[str, Any]:
    found = read_optional_json(artefact / MANIFEST_NAME).get(key)
    return found if isinstance(found, dict) else {}
