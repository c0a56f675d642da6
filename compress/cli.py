"""``venturi compress``, ``evaluate`` and ``export``; ``python -m compress`` is the first.

Exit codes: 0 done, 2 something the user can mend (one line ``venturi: ...`` says what),
3 refused by the gate, 130 interrupted.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compress.auto.resolve import resolve_auto
from compress.cache import Built, compress_cached, default_cache_dir
from compress.errors import CompressError, check_output, write_output
from compress.exits import REFUSED, exit_codes
from compress.gate.cli import evaluate_command
from compress.gate.config import MODES, Mode
from compress.memory import rss_anon_bytes
from compress.progress import Progress, make_progress
from compress.recipe import Recipe, resolve
from compress.sources import MANIFEST_NAME
from compress.staging import check_replaceable
from engine.client.files import read_optional_json

if TYPE_CHECKING:
    from compress.gate.judging import Judge
    from compress.gate.report import Report

__all__ = ["compress_command", "evaluate_command", "export_command"]


@click.command("compress")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--recipe", help="Preset (default w8a8), or path of a YAML file.")
@click.option(
    "--scale",
    is_flag=True,
    help="In place of a recipe: the smallest of w8a16, w8a8, w4a8 and sparse50-w4a8, in this "
    "order, before the first that does not pass the gate.",
)
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
@click.option(
    "--report", "page", type=click.Path(path_type=Path), help="Write the gate's HTML page there."
)
def compress_command(mode: str, **options: Any) -> None:
    """Compress the Hugging Face folder MODEL.

    The artefact's path is the last line on stdout. Exit code 3: refused by the gate.
    """
    asked = _Asked(**options)
    asked.check()
    run = _Run(asked, make_progress(mode))
    with exit_codes(run.progress, run.kept):
        start = time.perf_counter()
        if asked.page is not None:
            check_output(asked.page, "--report")
        result = run.climbed() if asked.scale else run.compressed()
        if asked.page is not None:
            _write_page(asked.page, result)
        run.progress.done(run.event(result, time.perf_counter() - start))
    if result.report is not None and result.report.refused:
        sys.exit(REFUSED)


@click.command("export")
@click.argument("artefact", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
def export_command(artefact: Path, out: Path) -> None:
    """Write the sparse ARTEFACT with explicit zeros, for engines that do not know its format.

    The new folder's path is the last line on stdout.
    """
    progress = make_progress("auto")
    with exit_codes(progress, lambda: "nothing was written"):
        from compress.export import export

        export(artefact, out, progress)
    click.echo(out.resolve())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """The options; ``recipe`` None is the default."""

    model: Path
    recipe: str | None
    scale: bool
    out: Path | None
    cache_dir: Path | None
    refuse_slow: bool
    gate: Mode | None
    kv_dtype: str
    page: Path | None

    def check(self) -> None:
        """Raises ``UsageError`` for what does not go together."""
        if self.out is not None and self.cache_dir is not None:
            raise click.UsageError("--out writes outside of the cache: leave --cache-dir out")
        if not self.scale:
            return
        if self.recipe is not None:
            raise click.UsageError("--scale tries recipes of its own: leave --recipe out")
        if self.out is not None:
            raise click.UsageError("--scale tries several recipes, in the cache: leave --out out")
        if self.gate not in (None, "enforce"):
            raise click.UsageError(f"--scale needs the gate: leave --gate {self.gate} out")

    @property
    def cache(self) -> Path:
        return (self.cache_dir or default_cache_dir()).resolve()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    """What is served; ``line`` is the verdict's, "" without a gate."""

    recipe: Recipe
    built: Built
    report: "Report | None" = None
    line: str = ""


def _write_page(page: Path, result: _Result) -> None:
    from compress.gate.page import make_page

    assert result.report is not None
    manifest = read_optional_json(result.built.artefact / MANIFEST_NAME)
    write_output(page, make_page(result.report, manifest), "--report")


class _Run:
    """One command."""

    def __init__(self, asked: _Asked, progress: Progress) -> None:
        self.progress = progress
        self._asked = asked
        # The artefacts that exist by now.
        self._builds: list[Built] = []

    def compressed(self) -> _Result:
        """By one recipe, whose gate may judge it."""
        recipe = resolve(self._asked.recipe or "w8a8")
        if self._asked.refuse_slow and (slow := recipe.slow_schemes):
            raise CompressError(
                f"{', '.join(slow)} has no fast kernel on this machine: serve it with "
                "--allow-slow, or another recipe, such as w8a8"
            )
        if self._asked.gate is not None:
            recipe = replace(recipe, gate=replace(recipe.gate, mode=self._asked.gate))
        if recipe.gate.mode == "off" and self._asked.page is not None:
            raise CompressError("--report is the gate's, which is off: add --gate warn or enforce")
        if recipe.auto is not None:
            recipe = self._searched(recipe)
        if recipe.gate.mode == "off":
            return _Result(recipe=recipe, built=self._build(recipe))
        from compress.gate.flow import compress_and_judge

        built, report = compress_and_judge(recipe, self._build, self._judge(recipe))
        return _Result(recipe=recipe, built=built, report=report, line=report.line())

    def climbed(self) -> _Result:
        """By the last recipe that the gate lets pass."""
        from compress.gate.scale import climb

        found = climb(self._build, self._judge, self.progress)
        line = f"--scale {found.line}"
        return _Result(recipe=found.recipe, built=found.built, report=found.report, line=line)

    def _searched(self, recipe: Recipe) -> Recipe:
        """With the search's modifiers; what would make it vain is looked at before."""
        if self._asked.out is not None:
            check_replaceable(self._asked.out)
        if recipe.gate.mode != "off":
            self._judge(recipe).check_data()
        return resolve_auto(recipe, self._asked.model, self._asked.cache, self.progress)

    def kept(self) -> str:
        """What an interrupted run leaves."""
        return f"{self._builds[-1].artefact} is there, not judged" if self._builds else ""

    def event(self, result: _Result, seconds: float) -> dict[str, object]:
        """Fields of the ``done`` event; any of the builds may have compressed."""
        memory = rss_anon_bytes()
        measured = next((one.measured for one in reversed(self._builds) if not one.cached), {})
        gate = {} if result.report is None else {**result.report.event(), "line": result.line}
        return {
            "recipe": result.recipe.name,
            "artefact": str(result.built.artefact),
            "key": result.built.key,
            "cached": all(one.cached for one in self._builds),
            **{
                name: measured.get(name, memory)
                for name in ("peak_rss_anon_bytes", "baseline_rss_anon_bytes")
            },
            "seconds": round(seconds, 3),
            **({"gate": gate} if gate else {}),
        }

    def _build(self, recipe: Recipe) -> Built:
        self._builds.append(self._built(recipe))
        return self._builds[-1]

    def _built(self, recipe: Recipe) -> Built:
        asked = self._asked
        if asked.out is None:
            return compress_cached(recipe, asked.model, asked.cache, self.progress)
        from compress.pipeline import compress

        manifest = compress(recipe, asked.model, asked.out, progress=self.progress)
        return Built(asked.out.resolve(), manifest.key, cached=False, measured=manifest.measured)

    def _judge(self, recipe: Recipe) -> "Judge":
        from compress.gate.judging import Judge

        return Judge(
            original=self._asked.model,
            gate=recipe.gate,
            seed=recipe.seed,
            kv_dtype=self._asked.kv_dtype,
            cache_dir=self._asked.cache,
            progress=self.progress,
        )
