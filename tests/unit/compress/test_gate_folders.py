"""Folders that are compressed already: judged against their original, which hashes tell."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import compress
from compress.cli import evaluate_command
from compress.gate.cli import judge_command

RECIPE = """
version: 1
modifiers: [{{type: rtn, scheme: w4a8}}]
gate: {{documents: 8, length: 24, max_kl: {max_kl}{more}}}
"""
Make = Callable[..., Path]


@pytest.fixture
def make(mini: Path, tmp_path: Path) -> Make:
    """make(max_kl=, more=) -> an artefact of the embedded model."""

    def make_artefact(max_kl: float = 5.0, more: str = "") -> Path:
        (tmp_path / "mine.yaml").write_text(RECIPE.format(max_kl=max_kl, more=more))
        compress.compress(str(tmp_path / "mine.yaml"), mini, tmp_path / "artefact")
        return tmp_path / "artefact"

    return make_artefact


@pytest.fixture
def other(mini: Path, tmp_path: Path) -> Path:
    """As the embedded model, with one bit changed."""
    folder = Path(shutil.copytree(mini, tmp_path / "other"))
    flip(folder / "model.safetensors")
    return folder


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def run(artefact: Path, original: Path, mode: str = "enforce") -> tuple[Result, Any]:
    options = ["--original", str(original), "--gate", mode]
    options += ["--cache-dir", str(artefact.parent / "cache")]
    done = CliRunner().invoke(judge_command, [str(artefact), *options])
    return done, [json.loads(line) for line in done.stdout.splitlines()]


def without_manifest(artefact: Path) -> Path:
    """As another program would have written it."""
    (artefact / "venturi.json").unlink()
    return artefact


def test_a_folder_is_judged_by_its_recipe(mini: Path, make: Make) -> None:
    done, events = run(make(), mini)
    assert done.exit_code == 0, done.output
    gate = events[-1]["gate"]
    assert (gate["mode"], gate["verdict"], gate["tokens"]) == ("enforce", "pass", 8 * 23)
    assert "on trust" not in gate["line"]
    again = run(make(), mini)[1]
    assert [event.get("phase") for event in again] == ["hashing", None]
    assert again[-1]["gate"] == gate
    for mode, code in (("warn", 0), ("enforce", 3)):
        done, events = run(make(max_kl=1e-3), mini, mode)
        assert done.exit_code == code
        assert (events[-1]["gate"]["verdict"], events[-1]["gate"]["refused"]) == ("fail", code == 3)


def test_a_restored_folder_is_judged_on_the_half_that_decided(mini: Path, make: Make) -> None:
    done, events = run(make(more=", restore: true"), mini)
    assert done.exit_code == 0, done.output
    assert "generating" in [event.get("phase") for event in events]
    assert any(event.get("detail") == "16 x 24 tokens to evaluate on" for event in events)
    assert events[-1]["gate"]["tokens"] == 8 * 23


def test_another_original_is_refused(make: Make, other: Path) -> None:
    artefact = make()
    done, events = run(artefact, other)
    assert done.exit_code == 2
    assert events[-1]["message"] == (
        f"{artefact} was not made of {other}, where model.safetensors differs: name its own "
        "original with --original"
    )
    (other / "tokenizer.json").unlink()
    shutil.copy(artefact.parent / "artefact" / "config.json", other)
    done = CliRunner().invoke(evaluate_command, [str(artefact), "--against", str(other)])
    assert done.exit_code == 2
    assert "where config.json differs: name its own original with --against" in done.stderr


def test_the_original_of_other_programs_folders_is_taken_on_trust(mini: Path, make: Make) -> None:
    artefact = without_manifest(make())
    done, events = run(artefact, mini)
    assert events[-1]["gate"]["line"].endswith(
        "; the original is taken on trust, for the artefact has no hashes of it"
    ), done.output


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_folder_that_was_changed_is_noticed(mini: Path, make: Make, name: str) -> None:
    artefact = make()
    before = (artefact / name).stat()
    content = (artefact / name).read_bytes()
    if name == "config.json":
        (artefact / name).write_bytes(content.replace(b"10000.0", b"10001.0"))
    else:
        flip(artefact / name)
    os.utime(artefact / name, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    wanted = f"{artefact / name} changed since it was written: remove {artefact} and compress again"
    done, events = run(artefact, mini)
    assert (done.exit_code, events[-1]["message"]) == (2, wanted)
    options = ["--against", str(mini), "--cache-dir", str(artefact.parent / "cache")]
    done = CliRunner().invoke(evaluate_command, [str(artefact), *options])
    assert (done.exit_code, done.stderr) == (
        2,
        f"hashing: {artefact} and {mini}\nventuri: {wanted}\n",
    )


def test_the_gates_data_must_still_be_there(mini: Path, make: Make) -> None:
    artefact = make(more=", data: [gone.txt]")
    done, events = run(artefact, mini)
    assert done.exit_code == 2
    message = f"gone.txt cannot be read: No such file or directory (the recipe of {artefact} names"
    assert message in events[-1]["message"]


def test_a_broken_gate_in_the_manifest(mini: Path, make: Make) -> None:
    artefact = make()
    manifest = json.loads((artefact / "venturi.json").read_text())
    manifest["recipe"]["resolved"]["gate"]["max_kl"] = "much"
    (artefact / "venturi.json").write_text(json.dumps(manifest))
    done, events = run(artefact, mini)
    assert done.exit_code == 2
    assert "its recipe's gate is broken" in events[-1]["message"]
