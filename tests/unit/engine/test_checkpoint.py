"""The checkpoint reader: good folders open, broken ones are refused in one line."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import ModelLoadError
from engine.formats.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, read_header, read_json

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.tensor([[-128, 127]], dtype=torch.int8),
    "c.weight": torch.ones(5, dtype=torch.bfloat16),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.zeros(0, 4),
}
GOOD_HEADER = {
    "x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "y": {"dtype": "I8", "shape": [4], "data_offsets": [16, 20]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a config and no weights yet."""
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return tmp_path


def write_raw(path: Path, header: Any, data: bytes = bytes(20), length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.tensors}


def refused(folder: Path) -> str:
    """The message with which the folder is refused; reading its tensors counts as well."""
    with pytest.raises(ModelLoadError) as caught:
        read_all(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_single_file_opens(folder: Path) -> None:
    save_file(TENSORS, folder / SINGLE_NAME, metadata={"format": "pt"})
    found = read_all(folder)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_infos_tell_dtype_shape_and_size(folder: Path) -> None:
    save_file(TENSORS, folder / SINGLE_NAME)
    info = Checkpoint.open(folder).info("c.weight")
    assert (info.dtype, info.shape, info.nbytes) == ("BF16", (5,), 10)


def test_shards_open_as_one(folder: Path) -> None:
    names = list(TENSORS)
    for number, part in enumerate((names[:2], names[2:])):
        save_file({name: TENSORS[name] for name in part}, folder / f"model-{number}.safetensors")
    files = [f"model-{0 if n < 2 else 1}.safetensors" for n in range(len(names))]
    write_index(folder, dict(zip(names, files, strict=True)))
    assert read_all(folder).keys() == TENSORS.keys()


def test_an_index_wins_over_a_single_file(folder: Path) -> None:
    save_file({"old": torch.zeros(1)}, folder / SINGLE_NAME)
    save_file({"new": torch.zeros(1)}, folder / "part.safetensors")
    write_index(folder, {"new": "part.safetensors"})
    assert list(read_all(folder)) == ["new"]


def test_a_tensor_is_a_copy_that_outlives_the_file(folder: Path) -> None:
    save_file(TENSORS, folder / SINGLE_NAME)
    tensor = Checkpoint.open(folder).tensor("a")
    tensor += 1
    (folder / SINGLE_NAME).unlink()
    assert float(tensor.sum()) == 15 + 6


def test_a_missing_tensor_is_named(folder: Path) -> None:
    save_file(TENSORS, folder / SINGLE_NAME)
    with pytest.raises(ModelLoadError, match=r"no tensor d\.weight"):
        Checkpoint.open(folder).tensor("d.weight")


@pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 3, 1), ()])
def test_a_tensor_of_another_shape_is_named(folder: Path, shape: tuple[int, ...]) -> None:
    save_file(TENSORS, folder / SINGLE_NAME)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.shaped("a", 2, 3).shape == (2, 3)
    with pytest.raises(ModelLoadError, match=r"a of shape .*\[2, 3\]"):
        checkpoint.shaped("a", *shape)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refused(tmp_path / "nowhere")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("x")
    refused(tmp_path / "model")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert "config.json is missing" in refused(tmp_path)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe", b"[]", b"null", b'"x"', b"[" * 100_000, b"{} trailing"]
)
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        read_json(tmp_path / "config.json")


def test_a_config_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    refused(tmp_path)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    assert SINGLE_NAME in refused(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model-Q4.gguf"])
def test_weights_in_other_formats_are_refused_with_a_remedy(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"x")
    assert "save_pretrained" in refused(folder)


def test_a_file_cut_anywhere_is_refused(folder: Path) -> None:
    save_file(TENSORS, folder / SINGLE_NAME)
    data = (folder / SINGLE_NAME).read_bytes()
    for length in range(len(data)):
        (folder / SINGLE_NAME).write_bytes(data[:length])
        message = refused(folder)
        assert SINGLE_NAME in message, length
        assert "truncated" in message, length


def test_a_file_with_bytes_after_its_end_is_refused(folder: Path) -> None:
    write_raw(folder / SINGLE_NAME, GOOD_HEADER, bytes(21))
    refused(folder)


@pytest.mark.parametrize(
    "length", [0, 1, (1 << 63), (1 << 64) - 1, 100 << 20, (100 << 20) + 1, 200, 1 << 40]
)
def test_a_header_length_that_cannot_be_is_refused(folder: Path, length: int) -> None:
    write_raw(folder / SINGLE_NAME, GOOD_HEADER, length=length)
    refused(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all",
        b"[]",
        b"null",
        b'{"x": 1}',
        b"[" * 50_000,
        b'{"x":' * 50_000,
        b"\xff\xfe{}",
    ],
)
def test_a_header_that_is_no_object_of_objects_is_refused(folder: Path, header: bytes) -> None:
    write_raw(folder / SINGLE_NAME, header)
    refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F31"},
        {"dtype": "f32"},
        {"dtype": None},
        {"dtype": ["F32"]},
        {"shape": [-2, -2]},
        {"shape": [-1, 4]},
        {"shape": [2, 3]},
        {"shape": "22"},
        {"shape": ["2", "2"]},
        {"shape": [2.5, 2]},
        {"shape": None},
        {"shape": [float("inf"), 0]},
        {"shape": [[2], 2]},
        {"shape": [10**30, 10**30]},
        {"data_offsets": [-16, 0]},
        {"data_offsets": [0, 17]},
        {"data_offsets": [16, 0]},
        {"data_offsets": [8, 24]},
        {"data_offsets": [1 << 62, (1 << 62) + 16]},
        {"data_offsets": [4, 20]},
        {"data_offsets": [0]},
        {"data_offsets": [0, 16, 32]},
        {"data_offsets": None},
        {"data_offsets": ["0", "16"]},
        {"data_offsets": [0.0, 16.0]},
        {"data_offsets": [float("nan"), 16]},
    ],
    ids=str,
)
def test_an_entry_that_makes_no_sense_is_refused(folder: Path, change: dict[str, Any]) -> None:
    write_raw(folder / SINGLE_NAME, {**GOOD_HEADER, "x": {**GOOD_HEADER["x"], **change}})
    refused(folder)


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
def test_an_entry_that_lacks_something_is_refused(folder: Path, key: str) -> None:
    entry = {name: value for name, value in GOOD_HEADER["x"].items() if name != key}
    write_raw(folder / SINGLE_NAME, {**GOOD_HEADER, "x": entry})
    refused(folder)


def test_tensors_that_overlap_are_refused(folder: Path) -> None:
    header = {**GOOD_HEADER, "z": {"dtype": "F32", "shape": [2, 2], "data_offsets": [4, 20]}}
    write_raw(folder / SINGLE_NAME, header)
    refused(folder)


def test_random_damage_is_refused_or_reads(folder: Path) -> None:
    """No other exception than ``ModelLoadError`` comes out, whatever byte was changed."""
    draw = random.Random(0)
    save_file(TENSORS, folder / SINGLE_NAME)
    data = (folder / SINGLE_NAME).read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    refusals = 0
    for _ in range(600):
        changed = bytearray(data)
        for _ in range(draw.randint(1, 3)):
            changed[draw.randrange(header)] = draw.choice(b'0123456789"[]{},:-.eEF \xff\x00')
        (folder / SINGLE_NAME).write_bytes(changed)
        try:
            read_all(folder)
        except ModelLoadError:
            refusals += 1
    assert refusals > 300


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 7])
def test_an_index_without_a_map_is_refused(folder: Path, weight_map: Any) -> None:
    write_index(folder, weight_map)
    assert INDEX_NAME in refused(folder)


def test_an_index_that_names_a_missing_shard_is_refused(folder: Path) -> None:
    save_file({"a": torch.zeros(1)}, folder / "one.safetensors")
    write_index(folder, {"a": "one.safetensors", "b": "two.safetensors"})
    assert "two.safetensors" in refused(folder)


@pytest.mark.parametrize(
    "name",
    ["../one.safetensors", "/etc/passwd", "sub/one.safetensors", "..", ".", "", "a\0b", None, 5],
)
def test_an_index_that_names_something_elsewhere_is_refused(folder: Path, name: Any) -> None:
    (folder / "sub").mkdir()
    for place in (folder.parent, folder / "sub"):
        save_file({"a": torch.zeros(1)}, place / "one.safetensors")
    write_index(folder, {"a": name})
    refused(folder)


def test_an_index_whose_tensor_is_in_no_shard_is_refused_when_it_is_read(folder: Path) -> None:
    save_file({"a": torch.zeros(1)}, folder / "one.safetensors")
    write_index(folder, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(ModelLoadError, match="no tensor b"):
        Checkpoint.open(folder).tensor("b")


def test_a_shard_that_is_a_folder_is_refused(folder: Path) -> None:
    (folder / SINGLE_NAME).mkdir()
    with pytest.raises(ModelLoadError):
        read_header(folder / SINGLE_NAME)


def test_a_single_file_of_another_name_is_named(tmp_path: Path) -> None:
    """As older GPTQ packers called it."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, tmp_path / "gptq_model-4bit-128g.safetensors")
    with pytest.raises(ModelLoadError, match=r"rename gptq_model-4bit-128g\.safetensors"):
        Checkpoint.open(tmp_path)
