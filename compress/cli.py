"""``venturi compress`` and ``venturi evaluate``; ``python -m compress`` is the former.

Exit codes: 0 done, 2 something the user can mend (one line ``venturi: ...`` says what),
130 interrupted.
"""

import sys
import time
from pathlib import Path

import click

from compress.cache import Built, compress_cached, default_cache_dir
from compress.errors import CompressError
from compress.memory import rss_anon_bytes
from compress.progress import Progress, make_progress
from compress.recipe import resolve
from engine.errors import ModelLoadError

USER_ERROR = 2
INTERRUPTED = 130


@click.command("compress")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--recipe", default="w8a8", show_default=True, help="Preset, or path of a YAML file.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of the artefact; else the cache has it."
)
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path),
    help="Default: $VENTURI_CACHE_DIR, $XDG_CACHE_HOME/venturi or ~/.cache/venturi.",
)
@click.option(
    "--progress",
    "mode",
    type=click.Choice(["auto", "json", "plain"]),
    default="auto",
    show_default=True,
    help="auto: a bar on a terminal, lines elsewhere; json: one event a line on stdout.",
)
def compress_command(
    model: Path, recipe: str, out: Path | None, cache_dir: Path | None, mode: str
) -> None:
    """Compress the Hugging Face folder MODEL.

    The artefact's path is the last line on stdout.
    """
    progress = make_progress(mode)
    try:
        progress.done(_compress(model, recipe, out, cache_dir, progress))
    except (CompressError, ModelLoadError) as error:
        progress.error(" ".join(str(error).split()))
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        progress.error("interrupted, nothing was written")
        sys.exit(INTERRUPTED)


def _compress(
    model: Path, spec: str, out: Path | None, cache_dir: Path | None, progress: Progress
) -> dict[str, object]:
    """The fields of the ``done`` event."""
    start = time.perf_counter()
    recipe = resolve(spec)
    if out is None:
        built = compress_cached(recipe, model, cache_dir or default_cache_dir(), progress)
    else:
        from compress.pipeline import compress

        manifest = compress(recipe, model, out, progress=progress)
        built = Built(out.resolve(), manifest.key, cached=False, measured=manifest.measured)
    memory = rss_anon_bytes()
    return {
        "artefact": str(built.artefact),
        "key": built.key,
        "cached": built.cached,
        "seconds": round(time.perf_counter() - start, 3),
        **{
            name: built.measured.get(name, memory)
            for name in ("peak_rss_anon_bytes", "baseline_rss_anon_bytes")
        },
    }
