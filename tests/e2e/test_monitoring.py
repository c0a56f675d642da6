"""A compressed model whose numbers overflow, through a real server: statuses, alarms, fallback.

The sabotaged artefact computes as the sound one does, but for prompts with the token ``POISON``:
the first norm makes infinity of a feature that no other token has.
"""

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
import torch
from click.testing import CliRunner
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as collector
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc
from opentelemetry.proto.metrics.v1.metrics_pb2 import NumberDataPoint
from safetensors.torch import load_file, save_file

from server.config import EMBEDDED_MODEL
from server.testing import ServerProcess
from venturi import cli
from venturi.v1 import admin_pb2, model_pb2
from venturi.v1 import inference_pb2 as pb
from venturi.v1.admin_pb2_grpc import AdminServiceStub
from venturi.v1.inference_pb2_grpc import InferenceServiceStub
from venturi.v1.model_pb2_grpc import ModelServiceStub

POISON, FEATURE = 4000, 7
SOUND = pb.TokenIds(ids=[300, 301, 302, 303])
BAD = pb.TokenIds(ids=[300, POISON, 302])
EACH_STEP = ("--monitor-steps", "1")
SOON = {"VENTURI_MONITOR_GAP": "0"}
ANSWER = pb.Stopping(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def sabotaged(cache_dir: Path, server: ServerProcess, tmp_path_factory: object) -> Path:
    """A cache whose artefact of the embedded model is broken, and as large as before."""
    folder = tmp_path_factory.mktemp("sabotaged") / "cache"  # type: ignore[attr-defined]
    shutil.copytree(cache_dir, folder)
    (file,) = (folder / "artefacts").glob("*/model.safetensors")
    size, tensors = file.stat().st_size, load_file(file)
    tensors["model.embed_tokens.weight"][:, FEATURE] = 0.0
    tensors["model.embed_tokens.weight"][POISON, FEATURE] = 0.5
    tensors["model.layers.0.input_layernorm.weight"][FEATURE] = torch.finfo(torch.bfloat16).max
    save_file(tensors, file, metadata={"format": "pt"})
    assert file.stat().st_size == size
    return folder


@pytest.fixture
def start(sabotaged: Path, pool: tuple[str, ...]) -> Callable[..., ServerProcess]:
    """Makes servers of the broken artefact that look into each step."""
    flags = "--cache-dir", str(sabotaged), *pool, *EACH_STEP
    return lambda *more: ServerProcess(*flags, *more, env=SOON)


def generate(channel: grpc.Channel, ids: pb.TokenIds) -> pb.GenerateResponse:
    request = pb.GenerateRequest(token_ids=ids, stopping=ANSWER)
    return InferenceServiceStub(channel).Generate(request)


def get_model(channel: grpc.Channel, name: str = "") -> model_pb2.Model:
    return ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest(model=name)).model


def failure(channel: grpc.Channel, ids: pb.TokenIds) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        generate(channel, ids)
    return caught.value


def retry_info(error: grpc.RpcError) -> bool:
    status = status_pb2.Status.FromString(
        dict(error.trailing_metadata())["grpc-status-details-bin"]
    )
    return any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details)


def when_served(channel: grpc.Channel, ids: pb.TokenIds) -> pb.GenerateResponse:
    """The first answer; until then each request is refused and may be tried again."""
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        try:
            return generate(channel, ids)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or not retry_info(error):
                raise
        time.sleep(0.02)
    raise TimeoutError


def test_without_a_fallback_the_others_are_served(start: Callable[..., ServerProcess]) -> None:
    with start() as server, grpc.insecure_channel(server.target) as channel:
        before = generate(channel, SOUND).choices
        error = failure(channel, BAD)
        assert error.code() is grpc.StatusCode.INTERNAL
        assert re.fullmatch("internal error, request [0-9a-f]{32}", error.details())
        assert generate(channel, SOUND).choices == before
        assert failure(channel, BAD).code() is grpc.StatusCode.INTERNAL
        model = get_model(channel)
        assert model.variant == "w8a8"
        assert not model.HasField("fallback")
        seen = model.monitoring
        assert seen.non_finite_logits == 2
        assert [alarm.kind for alarm in seen.alarms] == ["non_finite"]
        assert not seen.HasField("reference_entropy_nats")
        assert seen.entropy_nats > 0
        first = seen.layers[0]
        # The rows of the poisoned prompts, and no other.
        assert (first.non_finite, first.kv_non_finite) > (0, 0)
        assert 0 < first.zeroed_share < 1
        assert len(re.findall("alarm non_finite", server.output)) == 1
        load = AdminServiceStub(channel).GetLoad(admin_pb2.GetLoadRequest())
        assert load.engine_restarts_total == 0


def test_a_fallback_serves_the_original(start: Callable[..., ServerProcess]) -> None:
    with (
        start("--fallback", "non-finite", "--speculative-tokens", "0") as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = InferenceServiceStub(channel)
        long = pb.Stopping(max_tokens=480, ignore_eos=True)
        running = stub.GenerateStream(pb.GenerateStreamRequest(token_ids=SOUND, stopping=long))
        assert next(running).prompt_info.variant == "w8a8"
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        seen = [next(watch).status]
        assert failure(channel, BAD).code() is grpc.StatusCode.INTERNAL
        with pytest.raises(grpc.RpcError) as caught:
            list(running)
        # It had sent tokens: an error that no retry policy repeats.
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        answer = when_served(channel, BAD)
        assert answer.prompt_info.variant == "original"
        assert len(answer.choices[0].token_ids) == 8
        seen += [next(watch).status for _ in range(2)]
        Health = health_pb2.HealthCheckResponse
        assert seen == [Health.SERVING, Health.NOT_SERVING, Health.SERVING]
        watch.cancel()
        stream = stub.GenerateStream(
            pb.GenerateStreamRequest(token_ids=SOUND, stopping=ANSWER, model="venturi-mini@w8a8")
        )
        messages = list(stream)
        assert messages[0].prompt_info.variant == "original"
        assert messages[-1].summary.usage.completion_tokens == 8
        model = get_model(channel, "venturi-mini@original")
        assert (model.variant, model.precision.weights) == ("original", "float32")
        assert model.fallback.variant == "w8a8"
        assert "NaN or infinite" in model.fallback.reason
        assert not model.provenance.recipe
        assert model.monitoring.non_finite_logits == 0
        assert not model.monitoring.alarms
        assert len(re.findall("back from w8a8 to the original: .*; restart in", server.output)) == 1
        load = AdminServiceStub(channel).GetLoad(admin_pb2.GetLoadRequest())
        assert (load.engine_restarts_total, load.running, load.kv_blocks_used) == (1, 0, 0)


class Receiver(metrics_service_pb2_grpc.MetricsServiceServicer):
    """Keeps the last value of each metric by its attributes."""

    def __init__(self) -> None:
        self._values: dict[str, dict[tuple[object, ...], float]] = {}
        self._arrived = threading.Condition()

    def Export(
        self, request: collector.ExportMetricsServiceRequest, context: grpc.ServicerContext
    ) -> collector.ExportMetricsServiceResponse:
        with self._arrived:
            for metric in (
                m for r in request.resource_metrics for s in r.scope_metrics for m in s.metrics
            ):
                kind = getattr(metric, metric.WhichOneof("data"))
                for point in kind.data_points:
                    found = self._values.setdefault(metric.name, {})
                    found[_attributes(point)] = getattr(point, point.WhichOneof("value"))
            self._arrived.notify_all()
        return collector.ExportMetricsServiceResponse()

    def wait_for(self, wanted: float, name: str, *attributes: object) -> None:
        """Until the metric has that value under the attributes, which all must be there."""
        give_up = time.monotonic() + 30
        with self._arrived:
            while wanted not in self.values(name, *attributes):
                assert time.monotonic() < give_up, (name, self._values)
                self._arrived.wait(0.1)

    def values(self, name: str, *attributes: object) -> list[float]:
        points = self._values.get(name, {})
        return [value for key, value in points.items() if set(attributes) <= set(key)]

    @property
    def names(self) -> set[str]:
        return set(self._values)


def _attributes(point: NumberDataPoint) -> tuple[object, ...]:
    return tuple(getattr(a.value, a.value.WhichOneof("value")) for a in point.attributes)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    receiver = Receiver()
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    receiver.endpoint = f"http://127.0.0.1:{port}"  # type: ignore[attr-defined]
    server.start()
    yield receiver
    server.stop(0).wait()


def test_metrics_arrive_also_of_a_fallback(
    sabotaged: Path, pool: tuple[str, ...], receiver: Receiver
) -> None:
    env = {
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": receiver.endpoint,  # type: ignore[attr-defined]
        "OTEL_METRIC_EXPORT_INTERVAL": "200",
        **SOON,
    }
    flags = "--cache-dir", str(sabotaged), *pool, *EACH_STEP, "--fallback", "alarm"
    with (
        ServerProcess(*flags, env=env) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        generate(channel, SOUND)
        receiver.wait_for(4, "venturi.tokens", "input", "venturi-mini")
        receiver.wait_for(8, "venturi.tokens", "output")
        assert not receiver.values("venturi.tokens", "w8a8"), "it counts whatever variant serves"
        receiver.wait_for(0, "venturi.requests", "running")
        receiver.wait_for(8, "venturi.monitor.sampled_steps", "w8a8")
        receiver.wait_for(0, "venturi.kv_cache.blocks", "used", "w8a8")
        assert receiver.values("venturi.kv_cache.blocks", "free", "w8a8")[0] > 0
        for layer in range(6):
            (share,) = receiver.values("venturi.activation.zeroed_share", layer, "w8a8")
            assert 0 < share < 0.5
        assert receiver.values("venturi.logits.entropy", "w8a8")[0] > 0
        assert "venturi.logits.entropy_shift" not in receiver.names, "there is no reference"
        receiver.wait_for(0, "venturi.alarm", "non_finite", "w8a8")
        failure(channel, BAD)
        when_served(channel, BAD)
        receiver.wait_for(1, "venturi.fallback", "original")
        receiver.wait_for(1, "venturi.engine.restarts", "venturi-mini")
        assert not receiver.values("venturi.engine.restarts", "original")
        receiver.wait_for(0, "venturi.alarm", "non_finite", "original")


@pytest.mark.parametrize("fallback", ["alarm", "non-finite"])
def test_a_compressed_folder_falls_back_to_its_original(
    fallback: str, sabotaged: Path, pool: tuple[str, ...]
) -> None:
    (folder,) = (sabotaged / "artefacts").iterdir()
    flags = (str(folder), "--original", str(EMBEDDED_MODEL), *pool, *EACH_STEP)
    with (
        ServerProcess(*flags, "--fallback", fallback, env=SOON) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        assert generate(channel, SOUND).prompt_info.variant == "w8a8"
        assert failure(channel, BAD).code() is grpc.StatusCode.INTERNAL
        assert when_served(channel, BAD).prompt_info.variant == "original"
        assert get_model(channel).fallback.variant == "w8a8"


def test_a_compressed_folder_with_a_missing_original_is_refused(
    sabotaged: Path, tmp_path: Path
) -> None:
    (folder,) = (sabotaged / "artefacts").iterdir()
    flags = (str(folder), "--original", str(tmp_path / "nothing"), "--fallback", "alarm")
    with pytest.raises(RuntimeError, match=r"nothing, is no folder"):
        ServerProcess(*flags).__enter__()


def test_a_fallback_needs_an_original(cache_dir: Path) -> None:
    flags = ("--recipe", "none", "--fallback", "alarm", "--cache-dir", str(cache_dir))
    with pytest.raises(RuntimeError, match="--fallback alarm needs the original"):
        ServerProcess(*flags).__enter__()


def test_entropy_is_compared_with_what_the_gate_measured(
    cache_dir: Path, server: ServerProcess, tmp_path: Path, pool: tuple[str, ...]
) -> None:
    """The limit is so narrow that any traffic leaves it."""
    shutil.copytree(cache_dir, tmp_path / "cache")
    flags = ("--cache-dir", str(tmp_path / "cache"), *pool, *EACH_STEP, "--gate", "warn")
    alarm = ("--alarm-entropy", "0.0001", "--fallback", "alarm")
    with (
        ServerProcess(*flags, *alarm, env=SOON) as process,
        grpc.insecure_channel(process.target) as channel,
    ):
        assert get_model(channel).quality.verdict == "pass"
        stub = InferenceServiceStub(channel)
        many = pb.GenerateRequest(
            token_ids=SOUND,
            stopping=pb.Stopping(max_tokens=120, ignore_eos=True),
            sampling=pb.Sampling(n=8, temperature=1.0),
        )
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(many)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        when_served(channel, SOUND)
        model = get_model(channel)
        assert model.fallback.variant == "w8a8"
        assert "and the original's was" in model.fallback.reason
        assert not model.HasField("quality"), "that was of what fell back"
        seen = model.monitoring
        assert 1 < seen.reference_entropy_nats < 8
        assert not seen.alarms
        lines = CliRunner().invoke(cli.group, ["model", "--target", process.target]).stdout
        assert re.search(r"monitoring +\d+ steps looked at, entropy \d.*\(original \d", lines)
        assert re.search("fallback +from w8a8: output entropy is", lines)
