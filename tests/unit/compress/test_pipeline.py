"""The whole job in this process: what is written, and what is refused."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import compress
from compress import artefact
from compress.errors import CompressError
from compress.methods.rtn import Rtn
from compress.recipe import load
from compress.sources import MANIFEST_NAME
from engine.errors import ModelLoadError
from engine.formats import runtime
from engine.formats.checkpoint import Checkpoint

MakeModel = Callable[..., Path]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text())
    return found


def quantization_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def check_tensors(original: Path, out: Path) -> None:
    before, after = Checkpoint.open(original), Checkpoint.open(out)
    compressed = {row["name"] for row in manifest(out)["layers"] if row["method"] == "rtn"}
    names = set(before.tensors) | {f"{name}.weight_scale" for name in compressed}
    assert set(after.tensors) == names
    for name in before.tensors:
        module = name.removesuffix(".weight")
        if module not in compressed:
            assert torch.equal(after.tensor(name), before.tensor(name))
            continue
        expected = Rtn().apply(before.tensor(name)).weight
        assert torch.equal(after.tensor(name), expected.q_NK)
        assert torch.equal(after.tensor(f"{module}.weight_scale")[:, 0], expected.scale_N)


def test_the_embedded_model(mini: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = compress.compress("w8a8", mini, out)
    check_tensors(mini, out)
    found = manifest(out)
    assert found["key"] == result.key
    assert found["runtime"] == {"head": "int8", "kv_dtype": "int8"}
    assert runtime.read_runtime(out) == runtime.Runtime(head="int8", kv_dtype="int8")
    assert len(found["layers"]) == 43
    row = next(row for row in found["layers"] if row["name"] == Q_PROJ)
    assert row["storage"] == "int-quantized 8 bit per channel"
    assert row["execution"] == "int8 x int8"
    assert row["bits"] == 8 + 16 / 256
    assert 0 < row["relative_error"] < 0.02
    head = found["layers"][-1]
    assert head["storage"] == "bf16, tied to model.embed_tokens"
    assert head["execution"] == "int8 x int8, quantised when loaded"
    totals = found["totals"]
    assert totals["parameters"] == 5475584
    assert 8 < totals["effective_bits_per_weight"] < 8.1
    assert totals["bytes"] < 0.6 * totals["original_bytes"]
    assert found["recipe"]["name"] == "w8a8"
    assert found["sources"].keys() >= {"model.safetensors", "config.json", "tokenizer.json"}
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    assert found["files"] == {k: v for k, v in sizes.items() if k != MANIFEST_NAME}
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "NOTICE", "README.md"):
        assert (out / name).read_bytes() == (mini / name).read_bytes()


def test_transformers_loads_it_bit_equal(mini: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    compress.compress("w8a8", mini, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        model(torch.tensor([[0, 5, 6]]))
    expected = Rtn().apply(Checkpoint.open(mini).tensor(f"{Q_PROJ}.weight")).weight
    weight = model.get_submodule(Q_PROJ).weight
    assert torch.equal(weight, expected.q_NK.to(weight.dtype) * expected.scale_N[:, None])


def test_only_data_files_are_copied(make_model: MakeModel, tmp_path: Path) -> None:
    compress.compress("w8a8", make_model(), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", MANIFEST_NAME}


def test_config_of_a_whole_model(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    compress.compress("w8a8", model, tmp_path / "out")
    found = quantization_config(tmp_path / "out")
    assert found["quant_method"] == "compressed-tensors"
    assert found["format"] == "int-quantized"
    assert found["quantization_status"] == "compressed"
    assert found["ignore"] == ["lm_head"]
    assert found["config_groups"]["group_0"]["targets"] == ["Linear"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]
    assert config == json.loads((model / "config.json").read_text())


@pytest.mark.parametrize(
    ("patterns", "targets", "ignore"),
    [
        ('ignore: ["*.down_proj"]', ["Linear"], ["lm_head", "model.layers.0.mlp.down_proj"]),
        ('targets: ["re:.*q_proj"]', [Q_PROJ], None),
    ],
)
def test_config_of_a_partly_compressed_model(
    make_model: MakeModel,
    tmp_path: Path,
    patterns: str,
    targets: list[str],
    ignore: list[str] | None,
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"version: 1\nmodifiers:\n- type: rtn\n  scheme: w8a8\n  {patterns}\n")
    model = make_model(layers=1)
    compress.compress(load(recipe), model, tmp_path / "out")
    check_tensors(model, tmp_path / "out")
    found = quantization_config(tmp_path / "out")
    assert found["config_groups"]["group_0"]["targets"] == targets
    assert found["ignore"] == ignore or len(found["ignore"]) == 7
    kept = [row for row in manifest(tmp_path / "out")["layers"] if row["method"] == "none"]
    assert {row["name"] for row in kept} == set(found["ignore"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sharded_untied_models_of_other_dtypes(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(artefact, "SHARD_BYTES", 30_000)
    model = make_model(shards=3, tied=False, dtype=dtype, layers=11)
    compress.compress("w8a8", model, tmp_path / "out")
    check_tensors(model, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[-1] == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    assert {name: file for file in files for name in load_file(tmp_path / "out" / file)} == index[
        "weight_map"
    ]
    head = manifest(tmp_path / "out")["layers"][-1]
    assert (head["name"], head["storage"]) == ("lm_head", {2: "f16", 4: "f32"}[dtype.itemsize])
    # Layer by layer, in the order of numbers.
    order = [row["name"] for row in manifest(tmp_path / "out")["layers"][:-1]]
    assert [int(name.split(".")[2]) for name in order] == sorted(7 * list(range(11)))


def test_the_same_bits_twice(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    first = compress.compress("w8a8", model, tmp_path / "a")
    second = compress.compress("w8a8", model, tmp_path / "b")
    assert first == second
    for name in first.files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_artefact_is_replaced_and_nothing_else(make_model: MakeModel, tmp_path: Path) -> None:
    model, out = make_model(), tmp_path / "out"
    out.mkdir()
    compress.compress("w8a8", model, out)
    (out / "stale").touch()
    compress.compress("w8a8", model, out)
    assert not (out / "stale").exists()
    (out / MANIFEST_NAME).unlink()
    with pytest.raises(CompressError, match="not a Venturi artefact"):
        compress.compress("w8a8", model, out)
    with pytest.raises(CompressError, match="not a Venturi artefact"):
        compress.compress("w8a8", model, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def break_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return change


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (truncate, "is truncated"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "model.safetensors").unlink(), ".bin, .pt and .gguf files are not read"),
        (lambda f: (f / "model.safetensors").write_bytes(b"abc"), "truncated or not a safetensors"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "a JSON object"),
        (break_config(quantization_config={}), "compressed already"),
        (break_config(num_hidden_layers=3), "asks for 3 layers, the weights have 2"),
        (break_config(num_hidden_layers="2"), "asks for 2 layers"),
        (shutil.rmtree, "is not a folder"),
    ],
)
def test_broken_folders(
    make_model: MakeModel, tmp_path: Path, breakage: Callable[[Path], None], message: str
) -> None:
    model = make_model()
    breakage(model)
    with pytest.raises((CompressError, ModelLoadError)) as caught:
        compress.compress("w8a8", model, tmp_path / "out")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path != model]


def poison(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    return change


def retype(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q_PROJ}.weight"] = tensors[f"{Q_PROJ}.weight"].to(torch.int8)


def rename(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("model.layers", "transformer.h")] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (poison(f"{Q_PROJ}.weight", float("nan")), f"{Q_PROJ}.weight has NaN or infinite"),
        (poison(f"{Q_PROJ}.weight", float("-inf")), f"{Q_PROJ}.weight has NaN or infinite"),
        (poison("model.norm.weight", float("inf")), "model.norm.weight has NaN or infinite"),
        (retype, f"{Q_PROJ}.weight is I8"),
        (rename, "only models with Llama's layer names"),
    ],
)
def test_broken_weights(
    make_model: MakeModel,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], None],
    message: str,
) -> None:
    model = make_model(change=change)
    with pytest.raises(CompressError, match=message):
        compress.compress("w8a8", model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_modifiers_on_one_layer(make_model: MakeModel, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    step = "- {type: rtn, scheme: w8a8}\n"
    recipe.write_text(f"version: 1\nmodifiers:\n{step}{step}")
    with pytest.raises(CompressError, match=r"two modifiers target model\.layers\.0"):
        compress.compress(str(recipe), make_model(), tmp_path / "out")


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_half_way(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    with (
        file_size_limit(20_000),
        pytest.raises(CompressError, match=r"the limit on file sizes is reached.*--out"),
    ):
        compress.compress("w8a8", model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_fills_up(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CompressError, match="the disk is full"):
        compress.compress("w8a8", make_model(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_is_too_small(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 << 20))
    with pytest.raises(CompressError, match="has 5 MB free and 64 MB are needed"):
        compress.compress("w8a8", make_model(), tmp_path / "out")


@pytest.mark.parametrize("parent", ["file", "/proc/venturi"])
def test_an_unwritable_place(make_model: MakeModel, tmp_path: Path, parent: str) -> None:
    model = make_model()
    (tmp_path / "file").touch()
    with pytest.raises(CompressError, match=r"cannot write to .*: name another folder with --out"):
        compress.compress("w8a8", model, tmp_path / parent / "out")


def test_a_bit_that_flips_on_the_disk(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flip(self: artefact.ArtefactWriter) -> None:
        file = self._folder / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        write_files(self)

    write_files = artefact.ArtefactWriter.write_files
    monkeypatch.setattr(artefact.ArtefactWriter, "write_files", flip)
    with pytest.raises(CompressError, match="was read back with other bits"):
        compress.compress("w8a8", make_model(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_meanwhile(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    monkeypatch.setattr(
        artefact.ArtefactWriter, "verify", lambda _: (model / "tokenizer.json").write_text("{ }")
    )
    with pytest.raises(CompressError, match=r"tokenizer\.json changed while"):
        compress.compress("w8a8", model, tmp_path / "out")


def test_the_manifest_has_the_engines_name() -> None:
    assert runtime.MANIFEST_NAME == MANIFEST_NAME
