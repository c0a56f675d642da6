"""What can be wrong at the start: one line with the remedy, exit code 2, no traceback."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from server.config import EMBEDDED_MODEL


def run(*arguments: str) -> tuple[int, list[str]]:
    """Exit code and the lines that are not progress."""
    done = subprocess.run(
        [sys.executable, "-m", "server", "--port", "0", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr
    quiet = ("listening on", "compressing", "loading")
    lines = done.stderr.strip().splitlines()
    return done.returncode, [
        line for line in lines if not line.removeprefix("venturi: ").startswith(quiet)
    ]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the embedded model, to be broken."""
    return Path(shutil.copytree(EMBEDDED_MODEL, tmp_path / "model"))


def truncate(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def truncate_header(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def empty(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"")


def change_config(**changes: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def break_config(model: Path) -> None:
    (model / "config.json").write_text("{not json")


def remove(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def break_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")


CASES = {
    "truncated weights": (truncate, "truncated"),
    "truncated header": (truncate_header, "truncated"),
    "empty weights": (empty, "truncated"),
    "wrong hidden size": (change_config(hidden_size=128), "hidden_size|shape"),
    "wrong layer count": (change_config(num_hidden_layers=9), "no tensor|layers"),
    "wrong head count": (change_config(num_attention_heads=7), "heads"),
    "text for a number": (change_config(hidden_size="big"), "config.json"),
    "other architecture": (change_config(architectures=["FooForCausalLM"]), "FooForCausalLM"),
    "other rope": (change_config(rope_parameters={"rope_type": "dynamic"}), "dynamic"),
    "code in the folder": (change_config(architectures=None, auto_map={"x": "y"}), "architecture"),
    "broken config": (break_config, "config.json"),
    "missing config": (remove("config.json"), "config.json is missing"),
    "missing weights": (remove("model.safetensors"), "safetensors"),
    "missing tokenizer": (remove("tokenizer.json"), "tokenizer.json is missing"),
    "broken tokenizer": (break_tokenizer, "tokenizer.json"),
}


@pytest.mark.parametrize("recipe", ["w8a8", "none"])
@pytest.mark.parametrize("case", CASES)
def test_a_broken_model_is_one_line(model: Path, tmp_path: Path, case: str, recipe: str) -> None:
    damage, words = CASES[case]
    damage(model)
    cache = str(tmp_path / "cache")
    code, lines = run(str(model), "--recipe", recipe, "--cache-dir", cache)
    assert code == 2
    assert len(lines) == 1, lines
    assert any(word in lines[0] for word in words.split("|")), lines


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "3 bits"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "gemv"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ],
)
def test_a_quantisation_that_is_not_served_is_one_line(
    model: Path, changes: dict[str, object], words: str
) -> None:
    change_config(quantization_config=changes)(model)
    code, lines = run(str(model))
    assert (code, len(lines)) == (2, 1)
    assert words in lines[0]
    assert "--recipe" in lines[0]


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        code, lines = run("--port", str(other.getsockname()[1]))
    assert (code, len(lines)) == (2, 1)
    assert "in use" in lines[0]


def test_an_unknown_recipe_key_names_the_line_and_the_nearest_key(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("version: 1\nmodifers:\n  - {type: rtn, scheme: w8a8, targets: ['*_proj']}\n")
    code, lines = run("--recipe", str(recipe), "--cache-dir", str(tmp_path / "cache"))
    assert (code, len(lines)) == (2, 1)
    assert "mine.yaml" in lines[0]
    assert "line 2" in lines[0] or ":2" in lines[0]
    assert "modifiers" in lines[0]


def test_an_unwritable_cache_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    code, lines = run("--cache-dir", str(file / "cache"))
    assert (code, len(lines)) == (2, 1)
    assert "--cache-dir" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prt", "1"], "--port"),
        (["--kv-memory", "lots"], "--kv-memory"),
        (["--kv-memory", "1k"], "--kv-memory"),
        (["--max-sequences", "100", "--token-budget", "10"], "--token-budget"),
        (["/nowhere/at/all"], "/nowhere/at/all"),
        (["--recipe", "w9a9"], "w8a8"),
        (["--recipe", "fp8"], "--allow-slow"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--host", "999.1.1.1"], "999.1.1.1"),
    ],
)
def test_a_wrong_flag_is_one_line(arguments: list[str], words: str, tmp_path: Path) -> None:
    code, lines = run(*arguments, "--cache-dir", str(tmp_path))
    assert (code, len(lines)) == (2, 1), lines
    assert words in lines[0]


def test_a_file_of_settings_is_read_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("kv_memori: 1GiB\n")
    monkeypatch.setenv("VENTURI_CONFIG", str(file))
    for arguments in ((), ("--config", str(file))):
        code, lines = run(*arguments)
        assert (code, len(lines)) == (2, 1)
        assert "kv_memory" in lines[0]
