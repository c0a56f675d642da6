"""Recipes through a real server: what GetModel says, and artefacts served as they are."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from safetensors.torch import load_file, save_file
from torch import Tensor

import compress
from engine.formats import awq, gptq, pack_quantized
from engine.formats.grouped import GroupedWeight
from server.config import EMBEDDED_MODEL
from server.testing import ServerProcess
from venturi.v1 import inference_pb2 as pb
from venturi.v1 import model_pb2
from venturi.v1.inference_pb2_grpc import InferenceServiceStub
from venturi.v1.model_pb2_grpc import ModelServiceStub

RECIPE = "version: 1\nmodifiers: [{type: rtn, scheme: w4a8, group_size: 32, scale: mse}]\n"


def ask(process: ServerProcess) -> tuple[model_pb2.Model, str]:
    """The served model, and a greedy answer."""
    with grpc.insecure_channel(process.target) as channel:
        model = ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest()).model
        request = pb.GenerateStreamRequest(
            text="User: I would like to find a restaurant.", stopping=pb.Stopping(max_tokens=8)
        )
        messages = InferenceServiceStub(channel).GenerateStream(request)
        return model, "".join(c.text_delta for message in messages for c in message.chunks)


def test_a_recipe_is_served_and_then_its_artefact(tmp_path: Path, pool: tuple[str, ...]) -> None:
    cache, recipe = tmp_path / "cache", tmp_path / "mine.yaml"
    recipe.write_text(RECIPE)
    with ServerProcess("--recipe", str(recipe), "--cache-dir", str(cache), *pool) as process:
        model, text = ask(process)
    layers = {layer.name: layer for layer in model.layers}
    layer = layers["model.layers.0.self_attn.q_proj"]
    assert (layer.storage, layer.execution) == ("int4", "int4 x int8")
    assert (model.precision.weights, model.precision.activations) == ("int4", "int8")
    (artefact,) = (cache / "artefacts").iterdir()
    with ServerProcess(str(artefact), "--name", "mini", *pool) as process:
        again, same = ask(process)
    assert (model.variant, again.variant, again.name) == ("mine", "mine", "mini")
    assert again.provenance == model.provenance
    assert text == same


def convert(
    artefact: Path, folder: Path, pack: Callable[[GroupedWeight], dict[str, Tensor]],
    quantization: dict[str, Any],
) -> None:  # fmt: skip
    """A pack-quantized artefact as another program would have written its weights."""
    shutil.copytree(artefact, folder)
    (folder / "venturi.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        module = name.removesuffix(".weight_packed")
        of_module = [one for one in tensors if one.rpartition(".")[0] == module]
        weight = pack_quantized.unpack(
            {one.rpartition(".")[2]: tensors.pop(one) for one in of_module}
        )
        assert isinstance(weight, GroupedWeight)
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in pack(weight).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


PACKERS: dict[str, Callable[[GroupedWeight], dict[str, Tensor]]] = {
    "gptq": lambda weight: gptq.pack(weight, version=1),
    "awq": awq.pack,
}


def test_what_gptq_and_awq_packed_is_served_as_it_is(tmp_path: Path, pool: tuple[str, ...]) -> None:
    """The same weights give the same text, whoever packed them."""
    artefact = tmp_path / "ours"
    compress.compress("w4a16-rtn", EMBEDDED_MODEL, artefact)
    with ServerProcess(str(artefact), *pool) as process:
        _, text = ask(process)
    for kind, pack in PACKERS.items():
        quantization = {"quant_method": kind, "bits": 4, "group_size": 32}
        convert(artefact, tmp_path / kind, pack, quantization)
        with ServerProcess(str(tmp_path / kind), *pool) as process:
            model, same = ask(process)
        assert text == same
        assert (model.variant, model.provenance.format) == (kind, kind)
        assert (model.precision.weights, model.precision.activations) == ("int4", "float32")
        layers = {layer.name: layer for layer in model.layers}
        layer = layers["model.layers.0.self_attn.q_proj"]
        assert (layer.storage, layer.execution) == ("int4", "int4 x float32")


def test_fp8_is_served_where_it_may_be_slow(tmp_path: Path, pool: tuple[str, ...]) -> None:
    cache = str(tmp_path / "cache")
    arguments = ("--recipe", "fp8", "--allow-slow", "--cache-dir", cache, *pool)
    with ServerProcess(*arguments) as process:
        model, text = ask(process)
    assert text
    assert (model.precision.weights, model.precision.activations) == ("float8_e4m3", "float8_e4m3")
    assert {layer.execution for layer in model.layers if layer.name != "lm_head"} == {
        "float8_e4m3 x float8_e4m3"
    }
    assert model.provenance.format == "compressed-tensors/float-quantized"
