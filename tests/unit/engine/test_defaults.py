"""Generation defaults: what the model's own files say, where they say it."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.client.defaults import GenerationDefaults
from engine.errors import ModelLoadError


def read(folder: Path, generation: Any = None, config: Any = None) -> GenerationDefaults:
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            (folder / name).write_text(json.dumps(value))
    return GenerationDefaults.from_folder(folder)


def test_a_folder_that_says_nothing_is_greedy(tmp_path: Path) -> None:
    assert read(tmp_path) == GenerationDefaults()


def test_sampling_values_hold_where_the_model_samples(tmp_path: Path) -> None:
    values = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}
    found = read(tmp_path, values)
    assert (found.temperature, found.top_p, found.top_k) == (0.6, 0.9, 20)


def test_sampling_values_are_ignored_where_it_does_not(tmp_path: Path) -> None:
    values = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "top_k": 20}
    assert read(tmp_path, values) == GenerationDefaults()


def test_a_sampling_model_without_values_has_those_of_transformers(tmp_path: Path) -> None:
    found = read(tmp_path, {"do_sample": True})
    assert (found.temperature, found.top_p, found.top_k) == (1.0, 1.0, 50)


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        ({"eos_token_id": 2}, {"eos_token_id": 3}, (2,)),
        ({"eos_token_id": [2, 5]}, None, (2, 5)),
        ({}, {"eos_token_id": 3}, (3,)),
        (None, {"eos_token_id": [3]}, (3,)),
        ({}, {"eos_token_id": None}, ()),
    ],
)
def test_end_tokens_come_from_generation_config_then_config(
    tmp_path: Path, generation: Any, config: Any, wanted: tuple[int, ...]
) -> None:
    assert read(tmp_path, generation, config).eos_token_ids == wanted


@pytest.mark.parametrize(
    ("value", "wanted"), [("###", ("###",)), (["a", "b"], ("a", "b")), (None, ()), ([], ())]
)
def test_stop_strings_end_a_chat(tmp_path: Path, value: Any, wanted: tuple[str, ...]) -> None:
    assert read(tmp_path, {"stop_strings": value}).chat_stop == wanted


@pytest.mark.parametrize(
    "generation",
    [
        {"do_sample": True, "temperature": "hot"},
        {"do_sample": True, "top_k": [1]},
        {"do_sample": True, "top_p": {}},
        {"eos_token_id": "end"},
        {"eos_token_id": ["end"]},
        {"stop_strings": 5},
        [],
        "text",
    ],
)
def test_values_of_a_wrong_type_are_refused(tmp_path: Path, generation: Any) -> None:
    with pytest.raises(ModelLoadError, match=r"generation_config\.json"):
        read(tmp_path, generation)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.5},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
    ],
)
def test_values_out_of_range_are_refused(tmp_path: Path, values: dict[str, float]) -> None:
    """They would otherwise reach the sampler, which trusts that requests were checked."""
    with pytest.raises(ModelLoadError, match=r"generation_config\.json"):
        read(tmp_path, {"do_sample": True, **values})


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_bytes(b"{\xff")
    with pytest.raises(ModelLoadError, match=r"generation_config\.json"):
        GenerationDefaults.from_folder(tmp_path)


def test_the_shipped_model_is_greedy_and_ends(model_dir: Path) -> None:
    found = GenerationDefaults.from_folder(model_dir)
    assert (found.temperature, found.eos_token_ids) == (0.0, (0,))
