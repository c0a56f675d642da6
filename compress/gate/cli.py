"""``venturi evaluate``, and the judging that a server has done of what is compressed already."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from compress.cache import default_cache_dir
from compress.errors import CompressError, check_output, write_output
from compress.exits import REFUSED, exit_codes
from compress.gate.config import Gate, Mode
from compress.gate.decision import Outcome
from compress.gate.report import Report
from compress.memory import rss_anon_bytes
from compress.progress import JsonProgress, make_progress
from compress.sources import MANIFEST_NAME
from engine.client.files import read_optional_json


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
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Default: as compress has it.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write figures there.")
@click.option("--report", "page", type=click.Path(path_type=Path), help="Write an HTML page there.")
def evaluate_command(
    max_kl: float,
    max_drop: float,
    cache_dir: Path | None,
    json_file: Path | None,
    page: Path | None,
    **options: Any,
) -> None:
    """Compare the folder ARTEFACT with its original, and judge what was lost.

    Documents in a data file are separated by NUL, or are the "text" of JSON lines; a text file of
    a single document is cut into windows. Without --data the original writes the text.

    Exit code 0: it passes; 3: it fails, or the evidence is too small to say; 2: something is not
    as needed; 130: interrupted. A run that was interrupted or killed goes on when it is repeated.
    """
    progress = make_progress("auto")
    with exit_codes(progress, lambda: "no report was written"):
        _check_outputs(json_file, page)
        from rich.console import Console

        from compress.gate.evaluation_command import Asked, evaluate_folder
        from compress.measure.table import make_table

        asked = Asked(
            limits=Gate(max_kl=max_kl, max_drop=max_drop),
            cache_dir=(cache_dir or default_cache_dir()).resolve(),
            **options,
        )
        report = evaluate_folder(asked, progress)
        Console().print(make_table(report.evaluation))
        print(report.line())
        if json_file is not None:
            write_output(json_file, _figures(report), "--json")
        if page is not None:
            from compress.gate.page import make_page

            manifest = read_optional_json(asked.artefact / MANIFEST_NAME)
            write_output(page, make_page(report, manifest), "--report")
    if report.verdict.outcome is not Outcome.PASS:
        sys.exit(REFUSED)


def _check_outputs(json_file: Path | None, page: Path | None) -> None:
    for file, option in ((json_file, "--json"), (page, "--report")):
        if file is not None:
            check_output(file, option)
    if json_file is not None and page is not None and json_file.resolve() == page.resolve():
        raise CompressError(f"--json and --report are both {page}: name two files")


def _figures(report: Report) -> str:
    verdict = {"outcome": report.verdict.outcome.value, "line": report.line()}
    figures = {**asdict(report.evaluation), "verdict": verdict}
    return json.dumps(figures, indent=2, allow_nan=False) + "\n"


@click.command("judge")
@click.argument("artefact", type=click.Path(path_type=Path))
@click.option("--original", required=True, type=click.Path(path_type=Path))
@click.option("--gate", "mode", required=True, type=click.Choice(["warn", "enforce"]))
@click.option("--kv-dtype", type=click.Choice(["auto", "int8", "fp32"]), default="auto")
@click.option("--cache-dir", type=click.Path(path_type=Path))
def judge_command(
    artefact: Path, original: Path, mode: Mode, kv_dtype: str, cache_dir: Path | None
) -> None:
    """Judge ARTEFACT by its recipe's gate, telling what happens in JSON lines."""
    progress, start = JsonProgress(), time.perf_counter()
    with exit_codes(progress, lambda: "nothing was judged"):
        from compress.gate.artefact import judge_artefact

        report = judge_artefact(
            artefact,
            original,
            mode=mode,
            kv_dtype=kv_dtype,
            cache_dir=(cache_dir or default_cache_dir()).resolve(),
            progress=progress,
        )
        memory = rss_anon_bytes()
        progress.done(
            {
                "recipe": "",
                "artefact": str(artefact),
                "key": report.key,
                "cached": True,
                "peak_rss_anon_bytes": memory,
                "baseline_rss_anon_bytes": memory,
                "seconds": round(time.perf_counter() - start, 3),
                "gate": report.event(),
            }
        )
    if report.refused:
        sys.exit(REFUSED)
