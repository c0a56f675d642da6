"""The whole job in this process: what is written, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress import artefact
from compress.errors import CompressError
from compress.methods.rtn import Rtn
from compress.methods.scheme import Scheme
from compress.recipe import load
from compress.sources import MANIFEST_NAME
from engine.formats import float_quantized, runtime
from engine.formats.checkpoint import Checkpoint
from engine.kernels.reference import float8_linear

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
        expected = Rtn(Scheme()).quantise(before.tensor(name)).weight
        assert torch.equal(after.tensor(name), expected.q_NK)
        assert torch.equal(after.tensor(f"{module}.weight_scale")[:, 0], expected.scale_N)


def test_the_embedded_model(mini: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = compress.compress("w8a8", mini, out)
    check_tensors(mini, out)
    found = manifest(out)
    assert found["key"] == result.key
    assert found["runtime"] == {"head": "int8", "kv_dtype": "int8", "activations": "int8"}
    assert runtime.read_runtime(out) == runtime.Runtime(head="int8", activations="int8")
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


@pytest.mark.parametrize("kind", ["int", "float8"])
def test_transformers_loads_it_bit_equal(
    mini: Path, tmp_path: Path, kind: Literal["int", "float8"]
) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    compress.compress("w8a8" if kind == "int" else "fp8", mini, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        model(torch.tensor([[0, 5, 6]]))
    original = Checkpoint.open(mini).tensor(f"{Q_PROJ}.weight")
    expected = Rtn(Scheme(kind=kind)).quantise(original).weight
    weight = model.get_submodule(Q_PROJ).weight
    assert torch.equal(weight, expected.q_NK.to(weight.dtype) * expected.scale_N[:, None])


@pytest.mark.parametrize("name", [Q_PROJ, "model.layers.3.mlp.down_proj"])
def test_fp8_is_executed_as_the_package_does(mini: Path, tmp_path: Path, name: str) -> None:
    """Which rounds activations to FP8 per token too, and then multiplies in float32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    compress.compress("fp8", mini, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    seen: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_hook(
        lambda module, inputs, output: seen.extend([inputs[0][0], output[0]])
    )
    with torch.no_grad():
        model(torch.tensor([list(range(5, 25))]))
    read, given = seen
    checkpoint = Checkpoint.open(tmp_path / "out")
    suffixes = ("weight", "weight_scale")
    weight = float_quantized.unpack({one: checkpoint.tensor(f"{name}.{one}") for one in suffixes})
    assert torch.allclose(float8_linear(read, weight), given, atol=1e-5 * float(given.abs().max()))
    unrounded = read @ weight.dequantize().t()
    assert not torch.allclose(unrounded, given, atol=1e-3 * float(given.abs().max()))


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
    before = (out / MANIFEST_NAME).stat().st_ino
    compress.compress("w8a8", model, out)
    assert (out / MANIFEST_NAME).stat().st_ino != before
    (out / MANIFEST_NAME).unlink()
    with pytest.raises(CompressError, match="not a Venturi artefact"):
        compress.compress("w8a8", model, out)
    with pytest.raises(CompressError, match="not a Venturi artefact"):
        compress.compress("w8a8", model, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_the_manifest_has_the_engines_name() -> None:
    assert runtime.MANIFEST_NAME == MANIFEST_NAME
