"""``venturi compress`` and ``venturi evaluate``; ``python -m compress`` is the former.

Exit codes: 0 done, 2 something the user can mend (one line ``venturi: ...`` says what),
3 refused by the gate, 130 interrupted.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compress.auto.resolve import resolve_auto
from compress.cache import Built, compress_cached, default_cache_dir
from compress.errors import CompressError, writing
from compress.gate.config import MODES, Gate, Mode
from compress.memory import rss_anon_bytes
from compress.progress import Progress, make_progress
from compress.recipe import Recipe, resolve
from compress.sources import MANIFEST_NAME
from engine.client.files import read_optional_json
from engine.errors import ModelLoadError

if TYPE_CHECKING:
    from compress.gate.report import Report

USER_ERROR = 2
REFUSED = 3
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
@click.option("--gate", type=click.Choice(MODES), help="In place of the recipe's gate.mode.")
@click.option(
    "--kv-dtype",
    type=click.Choice(["auto", "int8", "fp32"]),
    default="auto",
    help="KV cache that will serve, for the gate.",
)
def compress_command(
    model: Path,
    recipe: str,
    out: Path | None,
    cache_dir: Path | None,
    refuse_slow: bool,
    mode: str,
    gate: Mode | None,
    kv_dtype: str,
) -> None:
    """Compress the Hugging Face folder MODEL.

    The artefact's path is the last line on stdout.
    """
    if out is not None and cache_dir is not None:
        raise click.UsageError("--out writes outside of the cache: leave --cache-dir out")
    progress = make_progress(mode)
    builds: list[Built] = []

    def build(one: Recipe) -> Built:
        builds.append(_build(one, model, out, cache_dir, progress))
        return builds[-1]

    with _exit_codes(progress, builds):
        start = time.perf_counter()
        resolved = resolve(recipe)
        if refuse_slow and (slow := resolved.slow_schemes):
            raise CompressError(
                f"{', '.join(slow)} has no fast kernel on this machine: serve it with "
                "--allow-slow, or another recipe, such as w8a8"
            )
        if gate is not None:
            resolved = replace(resolved, gate=replace(resolved.gate, mode=gate))
        resolved = resolve_auto(resolved, model, cache_dir or default_cache_dir(), progress)
        report = None
        if resolved.gate.mode == "off":
            build(resolved)
        else:
            report = _gated(resolved, model, cache_dir, kv_dtype, build, progress)
        seconds = round(time.perf_counter() - start, 3)
        progress.done({**_done(builds), "seconds": seconds, **_verdict(report)})
    if report is not None and report.refused:
        sys.exit(REFUSED)


@click.command("export")
@click.argument("artefact", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
def export_command(artefact: Path, out: Path) -> None:
    """Write the sparse ARTEFACT with explicit zeros, for engines that do not know its format.

    The new folder's path is the last line on stdout.
    """
    progress = make_progress("auto")
    with _exit_codes(progress):
        from compress.export import export

        export(artefact, out, progress)
    click.echo(out.resolve())


@click.command("evaluate")
@click.argument("artefact", type=click.Path(path_type=Path))
@click.option(
    "--against", "original", required=True, type=click.Path(path_type=Path), help="The original."
)
@click.option(
    "--data", multiple=True, type=click.Path(path_type=Path), help="Text file; may be repeated."
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    type=click.Path(path_type=Path),
    help="JSON lines of minimal pairs or multiple choice; may be repeated.",
)
@click.option("--documents", type=click.IntRange(min=1), help="Use so many documents at most.")
@click.option("--window", type=click.IntRange(min=2), default=256, show_default=True)
@click.option("--kv-dtype", type=click.Choice(["auto", "int8", "fp32"]), default="auto")
@click.option("--speed", is_flag=True, help="Measure generating at batch 1, 8 and 32 too.")
@click.option(
    "--max-kl",
    type=click.FloatRange(min=0, min_open=True),
    default=Gate().max_kl,
    show_default=True,
    help="Limit of the KL in nats per token.",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(0, 1),
    default=Gate().max_drop,
    show_default=True,
    help="Limit of the accuracy lost on a task, as a share.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write figures there.")
@click.option("--report", "page", type=click.Path(path_type=Path), help="Write an HTML page there.")
def evaluate_command(
    artefact: Path,
    original: Path,
    max_kl: float,
    max_drop: float,
    json_file: Path | None,
    page: Path | None,
    **options: Any,
) -> None:
    """Compare the folder ARTEFACT with its original, and judge what was lost.

    Documents in a data file are separated by NUL, or are the "text" of JSON lines; a text file of
    a single document is cut into windows. Without --data the original writes the text.
    """
    progress = make_progress("auto")
    with _exit_codes(progress):
        from rich.console import Console

        from compress.gate.evaluation_command import Asked, evaluate_folder
        from compress.gate.page import make_page
        from compress.measure.table import make_table

        limits = Gate(max_kl=max_kl, max_drop=max_drop)
        asked = Asked(artefact=artefact, original=original, limits=limits, **options)
        report = evaluate_folder(asked, progress)
        Console().print(make_table(report.evaluation))
        print(report.line())
        if json_file is not None:
            verdict = {"outcome": report.verdict.outcome.value, "line": report.line()}
            figures = {**asdict(report.evaluation), "verdict": verdict}
            text = json.dumps(figures, indent=2, allow_nan=False) + "\n"
            with writing(json_file, "name another file with --json"):
                json_file.write_text(text, encoding="utf-8")
        if page is not None:
            text = make_page(report, read_optional_json(artefact / MANIFEST_NAME))
            with writing(page, "name another file with --report"):
                page.write_text(text, encoding="utf-8")


@contextmanager
def _exit_codes(progress: Progress, builds: Sequence[Built] = ()) -> Iterator[None]:
    """``builds`` are the artefacts that exist by now."""
    try:
        yield
    except (CompressError, ModelLoadError) as error:
        progress.error(" ".join(str(error).split()))
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        left = f"{builds[-1].artefact} is there, not judged" if builds else "nothing was written"
        progress.error(f"interrupted, {left}")
        sys.exit(INTERRUPTED)


def _build(
    recipe: Recipe, model: Path, out: Path | None, cache_dir: Path | None, progress: Progress
) -> Built:
    if out is None:
        return compress_cached(recipe, model, cache_dir or default_cache_dir(), progress)
    from compress.pipeline import compress

    manifest = compress(recipe, model, out, progress=progress)
    return Built(out.resolve(), manifest.key, cached=False, measured=manifest.measured)


def _gated(
    recipe: Recipe,
    model: Path,
    cache_dir: Path | None,
    kv_dtype: str,
    build: Callable[[Recipe], Built],
    progress: Progress,
) -> "Report":
    from compress.gate.flow import compress_and_judge
    from compress.gate.judging import Judge

    judge = Judge(
        original=model,
        gate=recipe.gate,
        seed=recipe.seed,
        kv_dtype=kv_dtype,
        cache_dir=(cache_dir or default_cache_dir()).resolve(),
        progress=progress,
    )
    return compress_and_judge(recipe, build, judge)[1]


def _done(builds: Sequence[Built]) -> dict[str, object]:
    """Fields of the ``done`` event: the last is served, any of them may have compressed."""
    memory = rss_anon_bytes()
    measured = next((one.measured for one in reversed(builds) if not one.cached), {})
    return {
        "artefact": str(builds[-1].artefact),
        "key": builds[-1].key,
        "cached": all(one.cached for one in builds),
        **{
            name: measured.get(name, memory)
            for name in ("peak_rss_anon_bytes", "baseline_rss_anon_bytes")
        },
    }


def _verdict(report: "Report | None") -> dict[str, object]:
    return {} if report is None else {"gate": report.event()}
