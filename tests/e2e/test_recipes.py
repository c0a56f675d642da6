"""Recipes through a real server: what GetModel says, and artefacts served as they are."""

from pathlib import Path

import grpc

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
