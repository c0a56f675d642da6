"""``python -m compress``: exit codes, one-line errors, events."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from compress import compress
from compress.cache import Built
from compress.cli import compress_command, evaluate_command
from compress.gate.judging import Judge
from compress.progress import BarProgress, PlainProgress, make_progress

MakeModel = Callable[..., Path]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "compress", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def events(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def test_events(make_model: MakeModel, tmp_path: Path) -> None:
    before = time.time_ns()
    done = run(make_model(layers=1), "--cache-dir", tmp_path / "cache", "--progress", "json")
    assert done.returncode == 0
    assert done.stderr == ""
    found = events(done.stdout)
    assert all(before < event["time_ns"] < time.time_ns() for event in found)
    phases = [event["phase"] for event in found if event["event"] == "phase"]
    assert list(dict.fromkeys(phases)) == [
        "hashing", "planning", "compressing", "verifying", "publishing",
    ]  # fmt: skip
    layers = [event for event in found if event["event"] == "layer"]
    assert [event["item"] for event in layers] == list(range(1, 8))
    assert {event["items"] for event in layers} == {7}
    assert layers[0]["name"] == "model.layers.0.mlp.down_proj"
    assert layers[-1]["seconds_left"] >= 0
    last = found[-1]
    assert last.keys() == {
        "event", "recipe", "artefact", "key", "cached", "seconds",
        "peak_rss_anon_bytes", "baseline_rss_anon_bytes", "time_ns",
    }  # fmt: skip
    assert (last["event"], last["cached"]) == ("done", False)
    assert last["peak_rss_anon_bytes"] >= last["baseline_rss_anon_bytes"] > 0
    assert Path(last["artefact"], "config.json").is_file()


@pytest.mark.parametrize("interrupted", [True, False])
def test_what_a_gate_leaves(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    """A run that compressed, and then found what it serves, was no hit."""

    def judge(recipe: Any, build: Callable[[Any], Built], judge: Judge) -> tuple[Built, Any]:
        build(recipe)
        if interrupted:
            raise KeyboardInterrupt
        verdict = SimpleNamespace(refused=False, line=lambda: "pass", event=dict)
        return build(recipe), verdict

    monkeypatch.setattr("compress.gate.flow.compress_and_judge", judge)
    options = ["--cache-dir", str(tmp_path), "--gate", "warn", "--progress", "json"]
    done = CliRunner().invoke(compress_command, [str(make_model(layers=1)), *options])
    last = events(done.stdout)[-1]
    (artefact,) = (tmp_path / "artefacts").glob("[!.]*")
    if interrupted:
        assert done.exit_code == 130
        assert last["message"] == f"interrupted: {artefact} is there, not judged"
    else:
        assert (last["artefact"], last["cached"]) == (str(artefact), False)


def test_plain_output_ends_in_the_path(make_model: MakeModel, tmp_path: Path) -> None:
    done = run(make_model(), "--out", tmp_path / "out")
    assert done.returncode == 0
    assert done.stdout == f"{tmp_path / 'out'}\n"
    assert "14/14 model.layers.1.self_attn.v_proj" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nowhere"], "is not a folder"),
        (["{model}", "--recipe", "fp9"], "did you mean 'fp8'?"),
        (["{model}", "--recipe", "fp8", "--refuse-slow"], "serve it with --allow-slow, or another"),
        (["{model}", "--recipe", "{tmp}/bad.yaml"], "bad.yaml:2: the recipe has no key 'sed'"),
        (["{model}", "--cache-dir", "{tmp}/bad.yaml"], "--cache-dir"),
        (["{model}", "--out", "{tmp}"], "--out"),
    ],
)
@pytest.mark.parametrize("mode", ["auto", "json"])
def test_user_errors_are_one_line(
    make_model: MakeModel, tmp_path: Path, arguments: list[str], message: str, mode: str
) -> None:
    model = make_model()
    (tmp_path / "bad.yaml").write_text("version: 1\nsed: 1\n")
    filled = [argument.format(tmp=tmp_path, model=model) for argument in arguments]
    done = CliRunner().invoke(compress_command, [*filled, "--progress", mode])
    assert done.exit_code == 2
    assert message in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("hashing")]
    assert line.startswith("venturi: ")
    if mode == "json":
        last = events(done.stdout)[-1]
        assert (last["event"], f"venturi: {last['message']}") == ("error", line)


def test_truncated_weights_in_a_child(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    done = run(model, "--cache-dir", tmp_path / "cache", "--progress", "json")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "is truncated" in done.stderr
    assert events(done.stdout)[-1]["event"] == "error"


def test_evaluate_writes_a_page(mini: Path, tmp_path: Path) -> None:
    compress("w8a8", mini, tmp_path / "out")
    arguments = [tmp_path / "out", "--against", mini, "--documents", 8, "--window", 24]
    arguments += ["--cache-dir", tmp_path / "cache"]
    page = tmp_path / "page.html"
    done = CliRunner().invoke(
        evaluate_command, [*map(str, arguments), "--speed", "--report", str(page)]
    )
    assert done.exit_code == 0, done.output
    for batch in (1, 8, 32):
        assert f"generating, batch {batch}" in done.stdout
    assert "pass: KL to the original is 0.000" in done.stdout
    text = page.read_text()
    assert "Passed: the compressed model is close enough" in text
    assert "model.layers.5.mlp.down_proj" in text
    assert "sequences at a time" in text
    assert not re.search(r"(?:src|href)=|<script|@import|url\(", text)
    html = HTMLParser()
    html.feed(text)
    html.close()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--max-kl", "1e-6"], 3, "fail: KL to the original is 0.00"),
        (["--documents", "2"], 3, "inconclusive: "),
        (["--json", "{tmp}/no/x.json"], 2, "{tmp}/no is not a folder: make it, or name another"),
        (["--report", "{tmp}"], 2, "{tmp} is a folder: name another file with --report"),
        (["--report", "{tmp}/x", "--json", "{tmp}/x"], 2, "are both {tmp}/x: name two files"),
        (["--report", "/proc/self/x"], 2, "cannot write to /proc/self/x"),
        (["--task", "{tmp}/gone.jsonl"], 2, "gone.jsonl cannot be read: No such file"),
        (["--data", "{tmp}/gone.txt"], 2, "gone.txt cannot be read: No such file"),
        (["--against", "{tmp}/gone"], 2, "{tmp}/gone is not a folder"),
        (["--cache-dir", "{tmp}/w8a8/config.json"], 2, "writable folder with --cache-dir"),
    ],
)
def test_how_evaluate_ends(
    mini: Path, tmp_path: Path, options: list[str], code: int, message: str
) -> None:
    compress("w8a8", mini, tmp_path / "w8a8")
    arguments = [tmp_path / "w8a8", "--against", mini, "--documents", 8, "--window", 24]
    arguments += ["--cache-dir", tmp_path / "cache"]
    filled = [option.format(tmp=tmp_path) for option in options]
    done = CliRunner().invoke(evaluate_command, [*map(str, arguments), *filled])
    assert done.exit_code == code
    assert message.format(tmp=tmp_path) in done.output
    if code == 2:
        assert "evaluating" not in done.output
        assert done.stderr.splitlines()[-1].startswith("venturi: ")


@pytest.mark.parametrize("options", [["--report", "page.html"], ["--out", "{taken}"]])
def test_what_cannot_work_is_told_before_a_search(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setattr("compress.cli.resolve_auto", lambda *_: pytest.fail("searched"))
    (tmp_path / "file").touch()
    filled = [option.format(taken=tmp_path) for option in options]
    done = CliRunner().invoke(compress_command, [str(mini), "--recipe", "auto", *filled])
    assert done.exit_code == 2
    assert re.search("--report is the gate's|not a Venturi artefact", done.stderr)


def test_compress_writes_the_gates_page(mini: Path, tmp_path: Path) -> None:
    recipe, page = tmp_path / "mine.yaml", tmp_path / "page.html"
    recipe.write_text(
        "version: 1\nmodifiers: [{type: rtn, scheme: w4a8, group_size: 128}]\n"
        "gate: {documents: 8, length: 48, max_kl: 0.012, restore: true}\n"
    )
    options = ["--recipe", recipe, "--out", tmp_path / "small", "--report", page]
    arguments = [str(one) for one in (mini, *options)]
    environment = {"VENTURI_CACHE_DIR": str(tmp_path / "cache")}
    done = CliRunner().invoke(compress_command, arguments, env=environment)
    assert done.exit_code == 2
    assert "--report is the gate's, which is off" in done.stderr
    done = CliRunner().invoke(compress_command, [*arguments, "--gate", "warn"], env=environment)
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert "<code>small</code> against its original <code>venturi-mini</code>" in text
    assert str(tmp_path) not in text
    assert str(mini.parent) not in text
    rows = dict(re.findall(r"<code>model\.layers\.(\S+)</code>.*<td>([^<]*)</td></tr>", text))
    assert len(rows) == 42
    restored = {name[0] for name, why in rows.items() if why.startswith("restored: layer ")}
    assert 0 < len(restored) < 6
    assert all(f"layer {name[0]} alone cost 0.0" in why for name, why in rows.items()
               if name[0] in restored)  # fmt: skip
    left = {name: why for name, why in rows.items() if name[0] not in restored}
    assert {why for name, why in left.items() if "down_proj" in name} == {
        "8 bits, for groups of 128 do not divide rows of 704"
    }
    assert {why for name, why in left.items() if "down_proj" not in name} == {"by the recipe: rtn"}


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s left"), (119, "119 s left"), (200, "3 min left"),
                           (4000, "1 h 7 min left")]
)  # fmt: skip
def test_time_left_in_words(capsys: pytest.CaptureFixture[str], seconds: float, words: str) -> None:
    PlainProgress().layer(2, 2, "documents", seconds)
    assert capsys.readouterr().err == f"2/2 documents, {words}\n"


def test_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert type(make_progress("auto")) is PlainProgress
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = make_progress("auto")
    assert isinstance(bar, BarProgress)
    bar.phase("compressing", "[model]")
    bar.layer(1, 2, "model.layers.0.q_proj", 1.0)
    bar.layer(2, 2, "model.layers.0.k_proj", 0.0)
    bar.done({"artefact": "/a", "cached": False, "seconds": 1})
    output = capsys.readouterr()
    assert output.out == "/a\n"
    assert "[model]" in output.err
    bar.error("bad")
