"""``venturi compress`` and ``venturi evaluate``; ``python -m compress`` is the former.

Exit codes: 0 done, 2 something the user can mend (one line ``venturi: ...`` says what),
130 interrupted.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click

from compress.cache import Built, compress_cached, default_cache_dir
from compress.errors import CompressError, writing
from compress.memory import rss_anon_bytes
from compress.progress import PlainProgress, Progress, make_progress
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
    "--refuse-slow", is_flag=True, help="Refuse a recipe that this machine can only evaluate."
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
    model: Path,
    recipe: str,
    out: Path | None,
    cache_dir: Path | None,
    refuse_slow: bool,
    mode: str,
) -> None:
    """Compress the Hugging Face folder MODEL.

    The artefact's path is the last line on stdout.
    """
    if out is not None and cache_dir is not None:
        raise click.UsageError("--out writes outside of the cache: leave --cache-dir out")
    progress = make_progress(mode)
    with _exit_codes(progress):
        if refuse_slow and (slow := resolve(recipe).slow_schemes):
            raise CompressError(
                f"{', '.join(slow)} has no fast kernel on this machine: serve it with "
                "--allow-slow, or another recipe, such as w8a8"
            )
        progress.done(_compress(model, recipe, out, cache_dir, progress))


@click.command("evaluate")
@click.argument("artefact", type=click.Path(path_type=Path))
@click.option(
    "--against", "original", required=True, type=click.Path(path_type=Path), help="The original."
)
@click.option(
    "--data", multiple=True, type=click.Path(path_type=Path), help="Text file; may be repeated."
)
@click.option("--documents", type=click.IntRange(min=1), help="Use so many documents at most.")
@click.option("--window", type=click.IntRange(min=2), default=256, show_default=True)
@click.option("--kv-dtype", type=click.Choice(["auto", "int8", "fp32"]), default="auto")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write figures there.")
def evaluate_command(
    artefact: Path,
    original: Path,
    data: tuple[Path, ...],
    documents: int | None,
    window: int,
    kv_dtype: str,
    json_file: Path | None,
) -> None:
    """Compare the folder ARTEFACT with its original on text.

    Documents in a data file are separated by NUL; a file without NUL is cut into windows.
    """
    with _exit_codes(PlainProgress()):
        if not data:
            raise CompressError("there is no text to evaluate on: name a file with --data")
        from rich.console import Console
        from rich.progress import track

        from compress.evaluate import evaluate
        from compress.evaluation_table import make_table

        screen = Console(stderr=True)
        result = evaluate(
            artefact,
            original,
            data,
            window=window,
            documents=documents,
            kv_dtype=kv_dtype,
            watch=lambda windows: track(windows, "scoring", console=screen, transient=True),
        )
        Console().print(make_table(result))
        if json_file is not None:
            with writing(json_file, "name another file with --json"):
                json_file.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")


@contextmanager
def _exit_codes(progress: Progress) -> Iterator[None]:
    try:
        yield
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
