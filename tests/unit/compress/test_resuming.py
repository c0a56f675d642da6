"""Evaluations that end before they are done: what stays, and how the next one goes on."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import compress
from compress.cli import compress_command, evaluate_command
from compress.measure import scored
from compress.progress import PlainProgress

DOCUMENTS, QUESTIONS = 8, 4
# Runs a command, which is killed once so many documents and questions are scored.
KILLED = """
import os, signal, sys
from compress import cli
from compress.measure import scored
from compress.progress import PlainProgress

def layer(self, item, items, name, seconds_left):
    if items == {items} and item == {item}:
        os.kill(os.getpid(), signal.{signal})

scored.SAVE_EVERY_S = 0.0
PlainProgress.layer = layer
cli.{command}()
"""
Arguments = list[str]


def killed(command: str, item: int, arguments: Arguments, by: str = "SIGKILL") -> tuple[int, str]:
    """Exit code and errors."""
    items = DOCUMENTS + QUESTIONS if "--task" in arguments else DOCUMENTS
    script = KILLED.format(items=items, item=item, signal=by, command=command)
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def arguments(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Arguments:
    """Of an evaluation on text and questions; a cache and a file of figures may follow."""
    folder = tmp_path_factory.mktemp("resuming")
    compress.compress("w8a8", mini, folder / "w8a8")
    data, tasks = folder / "data.jsonl", folder / "order.jsonl"
    texts = [{"text": f"User: Who is number {n}? And who else?"} for n in range(DOCUMENTS)]
    data.write_text("\n".join(map(json.dumps, texts)))
    pairs = [{"sentence_good": f"User: {n}", "sentence_bad": f"{n} :User"} for n in range(4)]
    tasks.write_text("\n".join(map(json.dumps, pairs)))
    found = [folder / "w8a8", "--against", mini, "--data", data, "--task", tasks]
    return list(map(str, found))


@pytest.fixture(scope="module")
def whole(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Figures of an evaluation that nothing ended."""
    found, said = figures(arguments, tmp_path_factory.mktemp("whole"))
    assert "scored before" not in said
    return found


def figures(arguments: Arguments, cache: Path) -> tuple[dict[str, Any], str]:
    """Without speeds, and what was said."""
    file = cache / "figures.json"
    options = ["--cache-dir", str(cache), "--json", str(file), "--max-kl", "1"]
    cache.mkdir(exist_ok=True)
    done = CliRunner().invoke(evaluate_command, [*arguments, *options])
    # The questions are too few.
    assert done.exit_code in (0, 3), done.output
    found = json.loads(file.read_text())
    for side in ("original", "artefact"):
        assert found[side].pop("tokens_per_second") > 0
    return found, done.stderr


@pytest.mark.parametrize("item", [3, DOCUMENTS, DOCUMENTS + 2, DOCUMENTS + QUESTIONS])
def test_a_killed_evaluation_goes_on(
    arguments: Arguments, whole: dict[str, Any], tmp_path: Path, item: int
) -> None:
    cache = tmp_path / "cache"
    code, _ = killed("evaluate_command", item, [*arguments, "--cache-dir", str(cache)])
    assert code == -signal.SIGKILL
    found, said = figures(arguments, cache)
    assert f"{DOCUMENTS} documents, {QUESTIONS} questions, of which {item} were scored" in said
    assert not list((cache / "evaluations").glob("*.scored"))
    assert found == whole


def test_a_killed_gate_goes_on(mini: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "version: 1\nmodifiers: [{type: rtn, scheme: w8a8}]\n"
        f"gate: {{mode: enforce, documents: {DOCUMENTS}, length: 24}}\n"
    )
    arguments = [str(mini), "--recipe", str(recipe), "--progress", "plain", "--cache-dir"]
    verdicts = []
    for name, item in (("cache", 5), ("other", None)):
        cache = tmp_path / name
        if item is not None:
            code, _ = killed("compress_command", item, [*arguments, str(cache)])
            assert code == -signal.SIGKILL
        done = CliRunner().invoke(compress_command, [*arguments, str(cache)])
        assert done.exit_code == 0, done.output
        assert ("of which 5 were scored before" in done.stderr) == (item is not None)
        (folder,) = (cache / "artefacts").glob("[!.]*")
        verdicts.append(json.loads((folder / "report.json").read_text())["verdict"])
        assert not list((cache / "evaluations").glob("*.scored"))
    assert verdicts[0] == verdicts[1]


def test_an_interrupt_says_what_is_kept(arguments: Arguments, tmp_path: Path) -> None:
    cache = ["--cache-dir", str(tmp_path / "cache")]
    code, said = killed("evaluate_command", 5, [*arguments, *cache], by="SIGINT")
    assert code == 130
    assert said.endswith(
        "venturi: interrupted: no report was written; 5 of 12 documents and questions are scored, "
        "and kept for the next run\n"
    )


@pytest.mark.parametrize(
    ("breakage", "left"),
    [
        (lambda folder: (folder / "000000002.json").unlink(), 2),
        (lambda folder: os.truncate(folder / "000000003.json", 20), 3),
        (lambda folder: (folder / "000000001.json").write_text("[]"), 1),
        (lambda folder: (folder / "other.json").write_text("{}"), 5),
        (lambda folder: change_threads(folder / "000000004.json"), 4),
    ],
)
def test_what_is_damaged_is_scored_again(
    arguments: Arguments,
    whole: dict[str, Any],
    tmp_path: Path,
    breakage: Callable[[Path], None],
    left: int,
) -> None:
    cache = tmp_path / "cache"
    killed("evaluate_command", 5, [*arguments, "--cache-dir", str(cache)])
    (folder,) = (cache / "evaluations").glob("*.scored")
    breakage(folder)
    found, said = figures(arguments, cache)
    assert f"of which {left} were scored before" in said
    assert found == whole


def change_threads(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"threads": 99}))


def test_time_left_is_that_of_what_is_left(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, told, clock = tmp_path / "cache", [], [100.0]
    killed("evaluate_command", 6, [*arguments, "--cache-dir", str(cache)])

    def layer(self: Any, item: int, items: int, name: str, seconds_left: float) -> None:
        told.append((item, seconds_left))

    def tick() -> float:
        clock[0] += 1.0
        return clock[0]

    monkeypatch.setattr(PlainProgress, "layer", layer)
    monkeypatch.setattr("compress.measure.evaluate.time.perf_counter", tick)
    figures(arguments, cache)
    assert [item for item, _ in told] == [7, 8, 9, 10, 11, 12]
    # Two forward passes of a document read the clock twice each, and the estimate once.
    assert told[0] == (7, pytest.approx(5 * 5.0))
    assert told[-1] == (12, 0.0)


def test_a_folder_that_cannot_be_written(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scored, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(scored, "write_whole", full)
    cache = tmp_path / "cache"
    done = CliRunner().invoke(evaluate_command, [*arguments, "--cache-dir", str(cache)])
    assert done.exit_code == 2
    assert "the disk is full: name a writable folder with --cache-dir" in done.stderr
