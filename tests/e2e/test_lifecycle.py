"""Start-up, health, drain, engine death: what an operator relies on."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.testing import ServerProcess
from venturi import Client, VenturiError
from venturi.v1 import admin_pb2
from venturi.v1 import inference_pb2 as pb
from venturi.v1.admin_pb2_grpc import AdminServiceStub
from venturi.v1.inference_pb2_grpc import InferenceServiceStub

Health = health_pb2.HealthCheckResponse
# A second and more on a slow server: it still runs when a test does something to it.
LONG = pb.Stopping(max_tokens=480, ignore_eos=True)
SHORT = pb.Stopping(max_tokens=16, ignore_eos=True)


def check(channel: grpc.Channel, service: str = "") -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    return health_pb2_grpc.HealthStub(channel).Check(request).status


def details_of(error: grpc.RpcError) -> list[str]:
    """Names of the google.rpc details in a status."""
    trailers = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    return [detail.type_url.rsplit(".", 1)[-1] for detail in status.details]


class Watcher:
    """Collects what a server stream sends, in a thread."""

    def __init__(self, call: object) -> None:
        self.call, self.messages = call, []
        self.code: grpc.StatusCode | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for message in self.call:
                self.messages.append(message)
            self.code = grpc.StatusCode.OK
        except grpc.RpcError as error:
            self.code = error.code()

    def wait_for(self, condition: object, seconds: float = 60.0) -> None:
        give_up = time.monotonic() + seconds
        while not condition(self.messages):
            assert time.monotonic() < give_up, (self.messages, self.code)
            time.sleep(0.01)

    def join(self) -> None:
        self._thread.join(timeout=60)
        assert not self._thread.is_alive()


def test_the_port_is_open_and_not_serving_until_ready(tmp_path: Path) -> None:
    """Compressing happens behind an open port; early requests may try again."""
    with (
        ServerProcess("--cache-dir", str(tmp_path), wait_ready=False) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        watch = Watcher(health.Watch(health_pb2.HealthCheckRequest()))
        startup = Watcher(AdminServiceStub(channel).WatchStartup(admin_pb2.WatchStartupRequest()))
        with pytest.raises(grpc.RpcError) as caught:
            InferenceServiceStub(channel).Generate(pb.GenerateRequest(text="x"))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "RetryInfo" in details_of(caught.value)
        assert "grpc-retry-pushback-ms" in dict(caught.value.trailing_metadata())
        watch.wait_for(lambda m: m and m[0].status == Health.NOT_SERVING)
        assert check(channel, "liveness") == Health.SERVING
        watch.wait_for(lambda m: m[-1].status == Health.SERVING)
        startup.join()
        phases = [message.phase for message in startup.messages]
        assert phases == sorted(phases)
        assert phases[-1] == admin_pb2.PHASE_READY
        assert admin_pb2.PHASE_COMPRESSING in phases
        # Those that follow each other quickly are sent as the last of them.
        counted = [m.item for m in startup.messages if m.items == 42]
        assert counted == sorted(counted)
        assert counted[-1] > 0
        watch.call.cancel()


def test_a_second_start_is_a_cache_hit(server: ServerProcess, cache_dir: Path) -> None:
    (artefact,) = (cache_dir / "artefacts").iterdir()
    before = (artefact / "model.safetensors").stat().st_mtime_ns
    with ServerProcess("--cache-dir", str(cache_dir)) as second:
        assert "42/42" not in second.output
    assert (artefact / "model.safetensors").stat().st_mtime_ns == before


def test_sigterm_drains(slow: Callable[..., ServerProcess]) -> None:
    """NOT_SERVING at once, new requests refused, running ones complete, exit code 0."""
    with (
        slow() as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = InferenceServiceStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        watch = Watcher(health.Watch(health_pb2.HealthCheckRequest()))
        stream = Watcher(
            stub.GenerateStream(pb.GenerateStreamRequest(text="User: hello", stopping=LONG))
        )
        stream.wait_for(lambda m: m)
        server.process.send_signal(signal.SIGTERM)
        watch.wait_for(lambda m: m[-1].status == Health.NOT_SERVING)
        stream.join()
        assert stream.code is grpc.StatusCode.OK
        assert stream.messages[-1].summary.usage.completion_tokens == 480
        assert server.process.wait(timeout=30) == 0


def test_a_stream_that_begins_while_the_server_goes_ends_with_an_error(
    slow: Callable[..., ServerProcess],
) -> None:
    """Also where the SDK's retry finds nobody: gRPC's own stream would wait for ever."""
    ended: list[str] = []

    def begin(target: str) -> None:
        with Client(target) as client:
            try:
                with client.stream("User: hello", max_tokens=4) as stream:
                    list(stream)
            except VenturiError as error:
                ended.append(type(error).__name__)

    with (
        slow() as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        running = Watcher(
            InferenceServiceStub(channel).GenerateStream(
                pb.GenerateStreamRequest(text="User: hello", stopping=LONG)
            )
        )
        running.wait_for(lambda m: m)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for(re.compile("draining"))
        threads = [
            threading.Thread(target=begin, args=(server.target,), daemon=True) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert not any(thread.is_alive() for thread in threads)
        assert len(ended) == 4


def test_drain_refuses_and_ends_what_does_not_end_by_itself(
    slow: Callable[..., ServerProcess],
) -> None:
    with (
        slow() as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub, admin = InferenceServiceStub(channel), AdminServiceStub(channel)
        stream = Watcher(
            stub.GenerateStream(pb.GenerateStreamRequest(text="User: hello", stopping=LONG))
        )
        stream.wait_for(lambda m: m)
        request = admin_pb2.DrainRequest()
        request.timeout.FromMilliseconds(0)
        response = admin.Drain(request)
        assert (response.completed, response.aborted) == (0, 1)
        stream.join()
        assert stream.code is grpc.StatusCode.UNAVAILABLE
        assert check(channel) == Health.NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(pb.GenerateRequest(text="x"))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        load = admin.GetLoad(admin_pb2.GetLoadRequest())
        assert (load.running, load.kv_blocks_used) == (0, 0)


def test_a_killed_engine_is_restarted(slow: Callable[..., ServerProcess]) -> None:
    """Each open stream gets a status, health flips, and the same server serves again."""
    with (
        slow() as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = InferenceServiceStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        watch = Watcher(health.Watch(health_pb2.HealthCheckRequest()))
        request = pb.GenerateStreamRequest(text="User: hello", stopping=LONG)
        short = pb.GenerateRequest(text="User: hello", stopping=SHORT)
        wanted = stub.Generate(short).choices
        streams = [Watcher(stub.GenerateStream(request)) for _ in range(8)]
        streams[0].wait_for(lambda m: m)
        (pid,) = server.engine_pids()
        os.kill(pid, signal.SIGKILL)
        for stream in streams:
            stream.join()
            expected = grpc.StatusCode.INTERNAL if stream.messages else grpc.StatusCode.UNAVAILABLE
            assert stream.code is expected
        watch.wait_for(lambda m: [r.status for r in m[-2:]] == [Health.NOT_SERVING, Health.SERVING])
        assert stub.Generate(short).choices == wanted
        load = AdminServiceStub(channel).GetLoad(admin_pb2.GetLoadRequest())
        assert load.engine_restarts_total == 1
        assert server.engine_pids() != [pid]
        watch.call.cancel()


def test_the_engine_ends_with_a_killed_server_and_leaves_nothing(
    cache_dir: Path, tmp_path: Path
) -> None:
    env = {"TMPDIR": str(tmp_path)}
    with ServerProcess("--cache-dir", str(cache_dir), env=env) as server:
        (pid,) = server.engine_pids()
        server.process.kill()
        server.process.wait()
        give_up = time.monotonic() + 5
        # A dead process that nobody reaps has no executable any more.
        while Path(f"/proc/{pid}/exe").exists():
            assert time.monotonic() < give_up
            time.sleep(0.05)
        assert not list(tmp_path.iterdir())


def test_a_second_signal_ends_at_once(slow: Callable[..., ServerProcess]) -> None:
    with (
        slow() as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = InferenceServiceStub(channel)
        stream = Watcher(
            stub.GenerateStream(pb.GenerateStreamRequest(text="User: hello", stopping=LONG))
        )
        stream.wait_for(lambda m: m)
        server.process.send_signal(signal.SIGINT)
        server.wait_for(re.compile("draining, 1 requests"))
        server.process.send_signal(signal.SIGINT)
        stream.join()
        assert stream.code is grpc.StatusCode.UNAVAILABLE
        assert server.process.wait(timeout=30) == 0


def test_reflection_lists_the_services(channel: grpc.Channel) -> None:
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )

    names = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert {"venturi.v1.InferenceService", "grpc.health.v1.Health"} <= names


def test_the_ready_line_says_the_command_to_try(server: ServerProcess) -> None:
    ready = server.output[server.output.index("ready on") :]
    assert re.search(r'venturi generate "User: .*" --max-tokens 60 --target 127.0.0.1:\d+', ready)


def test_a_stopped_engine_is_not_ready_until_it_goes_on(slow: Callable[..., ServerProcess]) -> None:
    with slow("--engine-timeout", "1") as server, grpc.insecure_channel(server.target) as channel:
        (pid,) = server.engine_pids()
        inference = InferenceServiceStub(channel)
        call = inference.GenerateStream(pb.GenerateStreamRequest(text="User:", stopping=LONG))
        stream = Watcher(call)
        stream.wait_for(bool)
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        watch = Watcher(health)
        os.kill(pid, signal.SIGSTOP)
        try:
            watch.wait_for(lambda m: m and m[-1].status == Health.NOT_SERVING)
            assert check(channel, "liveness") == Health.SERVING
            with pytest.raises(grpc.RpcError) as caught:
                inference.Generate(pb.GenerateRequest(text="User:", stopping=SHORT))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "the service is unresponsive" in caught.value.details()
            assert "RetryInfo" in details_of(caught.value)
        finally:
            os.kill(pid, signal.SIGCONT)
        watch.wait_for(lambda m: m[-1].status == Health.SERVING)
        stream.wait_for(lambda m: m[-1].HasField("summary"))
        assert server.engine_pids() == [pid]
