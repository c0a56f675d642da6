"""The cache, with real processes where processes matter."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress import sources
from compress.cache import Built, compress_cached, default_cache_dir
from compress.errors import CompressError
from compress.progress import NoProgress
from compress.recipe import Recipe, load, resolve
from compress.sources import HashMemo
from compress.staging import remove_leftovers
from engine.testing import TOKENIZER_JSON

MakeModel = Callable[..., Path]
# Stays in the middle of the work until it gets a signal.
STUCK = """
import runpy, time
from compress.progress import JsonProgress
layer = JsonProgress.layer
def stick(self, item, *rest):
    layer(self, item, *rest)
    time.sleep(60 if item == 3 else 0)
JsonProgress.layer = stick
runpy.run_module("compress", run_name="__main__")
"""


def build(model: Path, cache: Path, recipe: Recipe | None = None) -> Built:
    return compress_cached(recipe or resolve("w8a8"), model, cache, NoProgress())


def start(model: Path, cache: Path, *python: str) -> subprocess.Popen[str]:
    arguments = [str(model), "--cache-dir", str(cache), "--progress", "json"]
    return subprocess.Popen(
        [sys.executable, *(python or ("-m", "compress")), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def start_stuck(model: Path, cache: Path) -> subprocess.Popen[str]:
    process = start(model, cache, "-c", STUCK)
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line).get("item") == 3:
            return process
    raise AssertionError("the third layer was never compressed")


def last_event(output: str) -> dict[str, Any]:
    event: dict[str, Any] = json.loads(output.splitlines()[-1])
    return event


def temporary(cache: Path) -> list[Path]:
    return list((cache / "artefacts").glob(".*"))


def test_second_time_is_a_hit(make_model: MakeModel, tmp_path: Path) -> None:
    model, cache = make_model(), tmp_path / "cache"
    first, second = build(model, cache), build(model, cache)
    assert (first.cached, second.cached) == (False, True)
    assert first.artefact == second.artefact == cache / "artefacts" / first.key
    assert not temporary(cache)


def test_key_depends_on_content_only(make_model: MakeModel, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = build(make_model("a"), cache)
    other = make_model("b")
    assert build(other, cache) == Built(first.artefact, first.key, cached=True)
    (other / "tokenizer.json").write_text(TOKENIZER_JSON + "\n")
    assert build(other, cache).key != first.key
    (other / "modeling.py").write_text("not part of an artefact")
    assert build(other, cache).cached


def test_key_depends_on_the_recipe_without_name_and_gate(
    make_model: MakeModel, tmp_path: Path
) -> None:
    model, cache, path = make_model(), tmp_path / "cache", tmp_path / "mine.yaml"
    key = build(model, cache).key
    rtn = "version: 1\nmodifiers: [{type: rtn, scheme: w8a8}]\n"
    path.write_text(rtn + "gate: {mode: off}\n")
    assert build(model, cache, load(path)).key == key
    path.write_text(rtn + "head: keep\n")
    assert build(model, cache, load(path)).key != key


@pytest.mark.parametrize("name", ["model.safetensors", "venturi.json", "tokenizer.json"])
def test_damaged_artefact_is_made_anew(make_model: MakeModel, tmp_path: Path, name: str) -> None:
    model, cache = make_model(), tmp_path / "cache"
    file = build(model, cache).artefact / name
    os.truncate(file, 1)
    assert not build(model, cache).cached
    assert file.stat().st_size > 1
    assert build(model, cache).cached


def test_hashes_are_remembered(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_SETTLED_NS", 0)
    file, memo = make_model() / "model.safetensors", tmp_path / "hashes.json"
    first = HashMemo(memo)
    digest = first.sha256(file)
    first.save()
    with monkeypatch.context() as patch:
        patch.setattr(sources.hashlib, "sha256", None)
        assert HashMemo(memo).sha256(file) == digest
    os.utime(file, ns=(1, 1))
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\xff")
    assert HashMemo(memo).sha256(file) != digest
    memo.write_text("[1")
    assert HashMemo(memo).sha256(file) != digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hashes.json", "model"]


def test_a_fresh_file_is_not_trusted(make_model: MakeModel, tmp_path: Path) -> None:
    memo = HashMemo(tmp_path / "hashes.json")
    memo.sha256(make_model() / "model.safetensors")
    memo.save()
    assert not (tmp_path / "hashes.json").exists()


def test_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("VENTURI_CACHE_DIR", raising=False)
    assert default_cache_dir() == Path("/home/me/.cache/venturi")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache_dir() == Path("/xdg/venturi")
    monkeypatch.setenv("VENTURI_CACHE_DIR", "/own")
    assert default_cache_dir() == Path("/own")


def test_unwritable_cache_names_the_remedy(make_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        CompressError, match=r"cannot write to .*: name a writable folder with --cache-dir"
    ):
        build(make_model(), tmp_path / "file" / "cache")


def test_a_hit_imports_no_torch(make_model: MakeModel, tmp_path: Path) -> None:
    model, cache = make_model(), tmp_path / "cache"
    build(model, cache)
    code = (
        "import sys\n"
        "from compress.cli import compress_command\n"
        "compress_command(standalone_mode=False)\n"
        "assert not {'torch', 'numpy', 'safetensors'} & sys.modules.keys()\n"
    )
    begin = time.monotonic()
    arguments = [str(model), "--cache-dir", str(cache), "--progress", "json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert last_event(done.stdout)["cached"] is True
    assert time.monotonic() - begin < 3


def test_two_processes_compress_once(make_model: MakeModel, tmp_path: Path) -> None:
    model, cache = make_model(), tmp_path / "cache"
    processes = [start(model, cache) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    events = [last_event(output) for output in outputs]
    assert sorted(event["cached"] for event in events) == [False, True]
    assert events[0]["artefact"] == events[1]["artefact"]
    assert sum('"compressing"' in output for output in outputs) == 1
    assert not temporary(cache)


def test_killed_half_way_then_again(make_model: MakeModel, tmp_path: Path) -> None:
    model, cache = make_model(), tmp_path / "cache"
    with start_stuck(model, cache) as process:
        process.kill()
    assert len(temporary(cache)) == len(list((cache / "artefacts").iterdir())) == 1
    assert not build(model, cache).cached
    assert not temporary(cache)
    assert build(model, cache).cached


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_leaves_nothing(
    make_model: MakeModel, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    model, cache = make_model(), tmp_path / "cache"
    with start_stuck(model, cache) as process:
        # A live process's folder is left alone.
        remove_leftovers(cache / "artefacts")
        assert len(temporary(cache)) == 1
        process.send_signal(number)
        process.communicate(timeout=30)
    assert process.returncode == code
    assert not list((cache / "artefacts").iterdir())
