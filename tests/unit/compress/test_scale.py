"""``--scale``: climbs from recipe to recipe until the gate stops it."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from compress.cli import compress_command
from compress.gate import scale
from compress.plan import make_plan
from compress.recipe import resolve
from engine.formats.checkpoint import Checkpoint

GATE = "gate: {{documents: 8, length: 24, max_kl: {max_kl}}}"
RECIPE = "version: 1\nmodifiers: [{{type: rtn, scheme: {scheme}, targets: {targets}}}]\n" + GATE


@pytest.fixture
def rungs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """rungs(name=(scheme, max_kl), ...): recipes in place of the presets."""

    def set_rungs(targets: str = '["*"]', **recipes: tuple[str, float]) -> None:
        names = []
        for name, (scheme, max_kl) in recipes.items():
            path = tmp_path / f"{name}.yaml"
            last = name == list(recipes)[-1]
            wanted = targets if last else '["*"]'
            path.write_text(RECIPE.format(scheme=scheme, max_kl=max_kl, targets=wanted))
            names.append(str(path))
        monkeypatch.setattr(scale, "RUNGS", tuple(names))

    return set_rungs


def run(mini: Path, tmp_path: Path) -> tuple[Result, list[dict[str, Any]]]:
    options = ["--scale", "--cache-dir", str(tmp_path / "cache"), "--progress", "json"]
    done = CliRunner().invoke(compress_command, [str(mini), *options])
    return done, [json.loads(line) for line in done.stdout.splitlines()]


def phases(events: list[dict[str, Any]]) -> list[str]:
    return [event["phase"] for event in events if event["event"] == "phase"]


def test_no_rung_is_larger_than_the_one_before(mini: Path) -> None:
    checkpoint = Checkpoint.open(mini)
    sizes = [make_plan(resolve(name), checkpoint).out_bytes for name in scale.RUNGS]
    assert sizes == sorted(sizes, reverse=True)
    assert resolve(scale.RUNGS[-1]).modifiers[0].sparsity == 0.5


def test_it_stops_before_the_first_that_does_not_pass(
    mini: Path, tmp_path: Path, rungs: Any
) -> None:
    rungs(safe=("w8a8", 0.05), risky=("w4a8", 0.001), never=("w4a8", 0.001))
    done, events = run(mini, tmp_path)
    assert done.exit_code == 0, done.output
    climbing = [e["detail"] for e in events if e.get("phase") == "climbing"]
    assert [detail.partition(", ")[2] for detail in climbing] == ["rung 1 of 3", "rung 2 of 3"]
    last = events[-1]
    assert (last["recipe"], last["gate"]["verdict"], last["gate"]["refused"]) == (
        "safe", "pass", False,
    )  # fmt: skip
    line = last["gate"]["line"]
    assert line.startswith("--scale stopped at safe (pass: KL to the original is ")
    assert "since risky does not pass: fail: KL to the original is " in line
    recipe = json.loads(Path(last["artefact"], "venturi.json").read_text())["recipe"]
    assert recipe["name"] == "safe"
    _, events = run(mini, tmp_path)
    assert set(phases(events)) == {"climbing", "hashing"}
    assert {**events[-1], "cached": False, "seconds": 0} | {"time_ns": 0} == {
        **last, **{k: events[-1][k] for k in last if k.endswith("bytes")},
        "seconds": 0, "time_ns": 0,
    }  # fmt: skip
    assert events[-1]["cached"] is True


def test_the_last_rung(mini: Path, tmp_path: Path, rungs: Any) -> None:
    rungs(first=("w8a16", 0.05), second=("w8a8", 0.05))
    done, events = run(mini, tmp_path)
    assert done.exit_code == 0
    assert events[-1]["recipe"] == "second"
    assert events[-1]["gate"]["line"].startswith("--scale stopped at second, the last rung: pass: ")


def test_nothing_passes(mini: Path, tmp_path: Path, rungs: Any) -> None:
    rungs(first=("w4a8", 0.001), second=("w8a8", 0.05))
    done, events = run(mini, tmp_path)
    assert done.exit_code == 3
    gate = events[-1]["gate"]
    assert (gate["refused"], gate["verdict"]) == (True, "fail")
    assert gate["line"].startswith("--scale stopped before the first rung, first: fail: KL")
    assert "take a recipe with more bits" in gate["line"]


def test_a_rung_that_cannot_be_made(mini: Path, tmp_path: Path, rungs: Any) -> None:
    rungs(targets="[nowhere]", first=("w8a8", 0.05), second=("w4a8", 0.05))
    done, events = run(mini, tmp_path)
    assert done.exit_code == 0, done.output
    assert events[-1]["recipe"] == "first"
    assert "since second cannot be made: " in events[-1]["gate"]["line"]
    rungs(targets="[nowhere]", second=("w4a8", 0.05))
    assert run(mini, tmp_path)[0].exit_code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "w8a8"], "leave --recipe out"),
        (["--gate", "off"], "leave --gate off out"),
        (["--gate", "warn"], "leave --gate warn out"),
        (["--out", "folder"], "leave --out out"),
    ],
)
def test_what_does_not_go_with_it(mini: Path, options: list[str], message: str) -> None:
    done = CliRunner().invoke(compress_command, [str(mini), "--scale", *options])
    assert done.exit_code == 2
    assert message in done.output
