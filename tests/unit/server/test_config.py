"""Settings: flags before environment before file before defaults, and nothing unknown."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.formats import QUANTIZATION_FILES
from engine.formats.checkpoint import Checkpoint
from server.config import (
    DEFAULT_PORT,
    EMBEDDED_MODEL,
    ConfigError,
    load_config,
    made_by,
    parse_size,
)


def test_flags_come_before_environment_before_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("port: 1\nhost: file\nmax_requests: 3\n")
    monkeypatch.setenv("VENTURI_PORT", "2")
    monkeypatch.setenv("VENTURI_HOST", "environment")
    config = load_config({"port": 4}, file)
    assert (config.port, config.host, config.max_requests) == (4, "environment", 3)


def test_the_default_is_the_embedded_model_as_int8_on_this_machine_only() -> None:
    config = load_config({}, None)
    assert (config.model, config.recipe, config.host) == (EMBEDDED_MODEL, "w8a8", "127.0.0.1")
    assert (config.served_name, config.variant) == ("venturi-mini", "w8a8")
    assert config.serves_reflection


def test_reflection_is_off_for_other_models_unless_asked_for(tmp_path: Path) -> None:
    assert not load_config({"model": tmp_path}, None).serves_reflection
    assert load_config({"model": tmp_path, "reflection": True}, None).serves_reflection


@pytest.mark.parametrize(
    ("text", "size"),
    [("1024", 1024), ("1k", 1000), ("1KiB", 1024), ("1.5 GiB", 3 << 29), ("500MB", 500_000_000)],
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"kv_memory": "much"}, "--kv-memory"),
        ({"port": 70000}, "--port"),
        ({"max_sequences": 9, "token_budget": 8}, "--token-budget"),
        ({"kv_dtype": "fp8"}, "--kv-dtype"),
        ({"drain_timeout": -1}, "--drain-timeout"),
        ({"threads": 100_000}, "--threads"),
        ({"max_queued_tokens": 0}, "--max-queued-tokens"),
        ({"cache_dir": ""}, "--cache-dir"),
        ({"scale": True, "recipe": "w8a8"}, "leave --recipe out"),
        ({"scale": True, "gate": "warn"}, "leave --gate warn out"),
    ],
)
def test_a_bad_value_names_the_flag(flags: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(flags, None)
    assert "\n" not in str(caught.value)


def test_an_unknown_setting_names_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("drain_timout: 3\n")
    with pytest.raises(ConfigError, match="did you mean drain_timeout"):
        load_config({}, file)


def test_the_current_folder_may_be_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config({"cache_dir": "."}, None).cache_dir == Path()


def test_a_misspelt_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENTURI_MAX_REQEUSTS", "3")
    with pytest.raises(ConfigError, match="did you mean VENTURI_MAX_REQUESTS"):
        load_config({}, None)


def test_the_variables_of_a_kubernetes_service_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENTURI_PORT", "tcp://10.0.0.1:50051")
    monkeypatch.setenv("VENTURI_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("VENTURI_PORT_50051_TCP_ADDR", "10.0.0.1")
    assert load_config({}, None).port == DEFAULT_PORT


@pytest.mark.parametrize("text", ["[1, 2]", "port: [", "\tport: 3"])
def test_a_broken_file_is_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config({}, file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "variant", "as_it_is"),
    [
        (None, "w4a8", True),
        ("none", "w4a8", True),
        ("w4a8", "w4a8", True),
        ("w8a8", "w8a8", False),
    ],
)
def test_a_compressed_folder_is_served_as_it_is(
    tmp_path: Path, recipe: str | None, variant: str, as_it_is: bool
) -> None:
    (tmp_path / "venturi.json").write_text('{"recipe": {"name": "w4a8"}}')
    flags = {"model": tmp_path} | ({} if recipe is None else {"recipe": recipe})
    config = load_config(flags, None)
    assert (config.variant, config.serves_as_it_is) == (variant, as_it_is)


def test_a_folder_that_another_program_quantised_is_served_as_it_is(tmp_path: Path) -> None:
    quantised = '{"quantization_config": {"quant_method": "compressed-tensors"}}'
    (tmp_path / "config.json").write_text(quantised)
    config = load_config({"model": tmp_path}, None)
    assert (config.variant, config.serves_as_it_is) == ("compressed-tensors", True)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"recipe": 1}'])
def test_what_a_broken_manifest_is_called(tmp_path: Path, text: str) -> None:
    (tmp_path / "venturi.json").write_text(text)
    config = load_config({"model": tmp_path}, None)
    assert (config.variant, config.serves_as_it_is) == ("w8a8", False)


@pytest.mark.parametrize(("file", "name"), [("quantize", "gptq"), ("quant", "awq")])
def test_a_folder_with_a_file_about_its_quantisation(tmp_path: Path, file: str, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / f"{file}_config.json").write_text("{}")
    config = load_config({"model": tmp_path}, None)
    assert (config.variant, config.serves_as_it_is) == (name, True)


@pytest.mark.parametrize("method", QUANTIZATION_FILES)
def test_a_folder_with_a_file_of_its_own_is_compressed_already(tmp_path: Path, method: str) -> None:
    """What the front end takes for it, the engine reads."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / QUANTIZATION_FILES[method]).write_text('{"bits": 4}')
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert made_by(tmp_path) == method
    found = Checkpoint.open(tmp_path).config["quantization_config"]
    assert found == {"quant_method": method, "bits": 4}
