"""Judges a folder that is compressed already, against its original."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from compress.errors import CompressError
from compress.gate.config import Gate, Mode
from compress.gate.folders import check_original
from compress.gate.judging import CONFIRMATION, Judge
from compress.gate.report import Report
from compress.progress import Progress
from compress.sources import MANIFEST_NAME, HashMemo
from engine.client.files import read_optional_json


def judge_artefact(
    artefact: Path,
    original: Path,
    *,
    mode: Mode,
    kv_dtype: str,
    cache_dir: Path,
    progress: Progress,
) -> Report:
    """By the limits and data of the recipe that made ``artefact``; by default for other folders.

    Raises ``CompressError`` or ``ModelLoadError``: a folder or data is not as needed.
    """
    resolved = _resolved(artefact)
    progress.phase("hashing", f"{artefact} and {original}")
    memo = HashMemo(cache_dir / "hashes.json")
    known = check_original(artefact, original, memo, "--original")
    judge = Judge(
        original=original,
        gate=replace(_gate(artefact, resolved), mode=mode),
        seed=resolved.get("seed", 0),
        kv_dtype=kv_dtype,
        cache_dir=cache_dir,
        progress=progress,
    )
    try:
        judge.check_data()
    except CompressError as error:
        raise CompressError(f"{error} (the recipe of {artefact} names it)") from error
    # Of what a restored artefact was made with, the verdict's half was never looked at.
    half = CONFIRMATION if judge.gate.restore else None
    return judge.report(artefact, half, original_known=known)


def _resolved(artefact: Path) -> Mapping[str, Any]:
    """The recipe of the manifest; {} where there is none."""
    recipe = read_optional_json(artefact / MANIFEST_NAME).get("recipe")
    found = recipe.get("resolved") if isinstance(recipe, dict) else None
    return found if isinstance(found, dict) else {}


def _gate(artefact: Path, resolved: Mapping[str, Any]) -> Gate:
    try:
        return msgspec.convert(resolved.get("gate", {}), Gate)
    except msgspec.ValidationError as error:
        raise CompressError(
            f"{artefact / MANIFEST_NAME}: its recipe's gate is broken: {error}: compress again"
        ) from error
