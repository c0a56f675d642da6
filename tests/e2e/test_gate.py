"""The gate through a real server: served with a verdict, or refused and still answering."""

import json
import re
import shutil
import signal
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.torch import load_file, save_file

import compress
from compress.gate.scale import RUNGS
from server.config import EMBEDDED_MODEL
from server.testing import ServerProcess
from venturi.v1 import admin_pb2, model_pb2
from venturi.v1 import inference_pb2 as pb
from venturi.v1.admin_pb2_grpc import AdminServiceStub
from venturi.v1.inference_pb2_grpc import InferenceServiceStub
from venturi.v1.model_pb2_grpc import ModelServiceStub

STRICT = """\
version: 1
modifiers: [{type: rtn, scheme: w4a8, group_size: 32}]
gate: {mode: enforce, max_kl: 0.001, documents: 8, length: 32, speed: true}
"""
Health = health_pb2.HealthCheckResponse


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of these tests' own: others count the artefacts in theirs."""
    return tmp_path_factory.mktemp("gate-cache")


@pytest.fixture
def strict(tmp_path: Path) -> Path:
    """A recipe that loses more than it allows."""
    path = tmp_path / "strict.yaml"
    path.write_text(STRICT)
    return path


def get_model(channel: grpc.Channel) -> model_pb2.Model:
    return ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest()).model


def test_what_fails_is_refused_and_says_why(strict: Path, cache_dir: Path) -> None:
    flags = ("--recipe", str(strict), "--cache-dir", str(cache_dir))
    with (
        ServerProcess(*flags, wait_ready=False) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        server.wait_for(re.compile("refused by the gate: fail: KL .* above the limit of 0.001;"))
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == Health.NOT_SERVING
        alive = health_pb2.HealthCheckRequest(service="liveness")
        assert health.Check(alive).status == Health.SERVING
        model = get_model(channel)
        assert (model.variant, model.quality.verdict) == ("strict", "fail")
        assert model.quality.mean_kl_nats > 0.001
        assert model.speed.decode_1 > 0 < model.speed.decode_32
        assert "above the limit" in model.quality.explanation
        assert model.provenance.recipe == "strict"
        assert not model.layers
        watch = AdminServiceStub(channel).WatchStartup(admin_pb2.WatchStartupRequest())
        (last,) = list(watch)
        assert last.phase == admin_pb2.PHASE_FAILED
        assert "refused by the gate" in last.detail
        with pytest.raises(grpc.RpcError) as caught:
            InferenceServiceStub(channel).Generate(pb.GenerateRequest(text="x"))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "refused by the gate" in caught.value.details()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=10) == 3


def test_a_warning_serves_and_marks_the_model(
    strict: Path, cache_dir: Path, pool: tuple[str, ...]
) -> None:
    flags = ("--recipe", str(strict), "--gate", "warn", "--cache-dir", str(cache_dir))
    with ServerProcess(*flags, *pool) as server, grpc.insecure_channel(server.target) as channel:
        assert "served although the gate says: fail" in server.output
        model = get_model(channel)
        assert model.quality.verdict == "fail"
        assert model.precision.weights == "int4"


def test_what_passes_is_served(cache_dir: Path, pool: tuple[str, ...]) -> None:
    flags = ("--gate", "enforce", "--cache-dir", str(cache_dir))
    with ServerProcess(*flags, *pool) as server, grpc.insecure_channel(server.target) as channel:
        quality = get_model(channel).quality
        assert quality.verdict == "pass"
        assert not get_model(channel).HasField("speed")
        assert quality.tokens == 32 * 127
        assert 0 < quality.mean_kl_nats < 0.002


@pytest.fixture
def one_layer(tmp_path: Path) -> Path:
    """The embedded model's first layer, with all else: quickly compressed."""
    folder = Path(shutil.copytree(EMBEDDED_MODEL, tmp_path / "one-layer"))
    config = json.loads((folder / "config.json").read_text())
    small = {"num_hidden_layers": 1, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config | small))
    tensors = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if ".layers." not in k or ".layers.0." in k}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_smallest_that_passes_is_served(
    one_layer: Path, cache_dir: Path, pool: tuple[str, ...]
) -> None:
    flags = (str(one_layer), "--scale", "--cache-dir", str(cache_dir), *pool)
    with ServerProcess(*flags) as server, grpc.insecure_channel(server.target) as channel:
        (line,) = re.findall(r"the gate: (--scale stopped at .*)", server.output)
        model = get_model(channel)
        assert model.quality.explanation == line
        assert model.variant in RUNGS
        assert model.provenance.recipe == model.variant
        assert f"stopped at {model.variant}" in line
        assert re.search(r"compressing .*w8a8, rung 2 of 4", server.output)
        assert f"one-layer@{model.variant}" in server.output
        (last,) = AdminServiceStub(channel).WatchStartup(admin_pb2.WatchStartupRequest())
        assert (last.phase, last.detail) == (admin_pb2.PHASE_READY, line)
    with ServerProcess(*flags) as server, grpc.insecure_channel(server.target) as channel:
        assert "evaluating" not in server.output
        assert get_model(channel).quality == model.quality


def test_a_compressed_folder_is_judged_against_its_original(
    tmp_path: Path, cache_dir: Path, pool: tuple[str, ...]
) -> None:
    artefact = tmp_path / "artefact"
    compress.compress("w8a8", EMBEDDED_MODEL, artefact)
    flags = (str(artefact), "--gate", "enforce", "--cache-dir", str(cache_dir))
    with pytest.raises(RuntimeError, match=f"needs the original of {artefact}, .* --original"):
        ServerProcess(*flags).__enter__()
    flags = (*flags, "--original", str(EMBEDDED_MODEL))
    with ServerProcess(*flags, *pool) as server, grpc.insecure_channel(server.target) as channel:
        model = get_model(channel)
        assert (model.variant, model.quality.verdict) == ("w8a8", "pass")
        assert f"the gate: {model.quality.explanation}" in server.output
    with (artefact / "model.safetensors").open("ab") as file:
        file.write(b"more")
    for broken, message in ((flags, "changed since it was written"), ((str(artefact),), "bytes")):
        with pytest.raises(RuntimeError, match=message):
            ServerProcess(*broken).__enter__()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--recipe", "none", "--gate", "enforce"), "is served as it is: leave --gate out"),
        (("--gate", "warn", "--original", "folder"), "is compressed now: leave --original out"),
        (("--original", "folder"), "add one of them"),
    ],
)
def test_what_the_gate_cannot_judge(cache_dir: Path, flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ServerProcess(*flags, "--cache-dir", str(cache_dir)).__enter__()
