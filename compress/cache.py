"""The content-addressed cache of artefacts: ``<cache>/artefacts/<key>``. Imports no torch.

A hit needs no lock, since artefacts appear whole or not at all. A miss is compressed under
the key's lock, so that a second process waits and then hits.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.errors import CompressError, writing
from compress.files import locked
from compress.job import Job
from compress.manifest import is_intact
from compress.progress import Progress
from compress.recipe import Recipe
from compress.sources import HashMemo

CACHE_REMEDY = "name a writable folder with --cache-dir"


@dataclass(frozen=True, slots=True)
class Built:
    """An artefact and how it came; ``measured`` as in its manifest, empty for a hit."""

    artefact: Path
    key: str
    cached: bool
    measured: Mapping[str, Any] = field(default_factory=dict)


def default_cache_dir() -> Path:
    """$VENTURI_CACHE_DIR, else $XDG_CACHE_HOME/venturi, else ~/.cache/venturi."""
    if own := os.environ.get("VENTURI_CACHE_DIR"):
        return Path(own)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "venturi"
    try:
        return Path.home() / ".cache" / "venturi"
    except RuntimeError as error:
        raise CompressError(f"this user has no home folder: {CACHE_REMEDY}") from error


def compress_cached(recipe: Recipe, model_dir: Path, cache_dir: Path, progress: Progress) -> Built:
    """Finds or makes the artefact of ``model_dir``.

    Raises:
        CompressError, ModelLoadError: the model, the cache or the disk is not as needed.
    """
    cache_dir = cache_dir.resolve()
    with writing(cache_dir, CACHE_REMEDY):
        for folder in ("artefacts", "locks"):
            (cache_dir / folder).mkdir(parents=True, exist_ok=True)
    job = Job.prepare(recipe, model_dir, HashMemo(cache_dir / "hashes.json"), progress)
    artefact = cache_dir / "artefacts" / job.key
    if is_intact(artefact, job.key):
        return Built(artefact, job.key, cached=True)
    lock = cache_dir / "locks" / f"{job.key}.lock"
    with locked(lock, progress, "another process compresses the same model", CACHE_REMEDY):
        if is_intact(artefact, job.key):
            return Built(artefact, job.key, cached=True)
        from compress.pipeline import run

        manifest = run(job, artefact, progress, remedy=CACHE_REMEDY)
    return Built(artefact, job.key, cached=False, measured=manifest.measured)
