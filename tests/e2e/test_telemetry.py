"""Spans arrive at an OTLP receiver with the right names, parents and statuses."""

import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as collector
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from server.testing import ServerProcess
from venturi.v1 import inference_pb2 as pb
from venturi.v1.inference_pb2_grpc import InferenceServiceStub

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PROMPT = "a text that must not be recorded"


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that it gets."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._arrived = threading.Condition()

    def Export(
        self, request: collector.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> collector.ExportTraceServiceResponse:
        with self._arrived:
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    self.spans += scope.spans
            self._arrived.notify_all()
        return collector.ExportTraceServiceResponse()

    def wait_for(self, name: str, seconds: float = 15) -> Span:
        give_up = time.monotonic() + seconds
        with self._arrived:
            while not (found := [s for s in self.spans if s.name == name]):
                assert self._arrived.wait(0.1) or time.monotonic() < give_up, name
            return found[-1]

    def children(self, parent: Span) -> dict[str, Span]:
        return {s.name: s for s in self.spans if s.parent_span_id == parent.span_id}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    receiver = Receiver()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    receiver.port = server.add_insecure_port("127.0.0.1:0")  # type: ignore[attr-defined]
    server.start()
    yield receiver
    server.stop(0).wait()


def attributes(span: Span) -> dict[str, object]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def test_one_trace_from_the_caller_to_the_phases(tmp_path: Path, receiver: Receiver) -> None:
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.port}",  # type: ignore[attr-defined]
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    method = "venturi.v1.InferenceService/GenerateStream"
    with (
        ServerProcess("--cache-dir", str(tmp_path), env=env) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        startup = receiver.wait_for("venturi.startup")
        assert startup.parent_span_id == b""
        parts = receiver.children(startup)
        assert set(parts) == {"compress", "load"}
        compression = receiver.children(parts["compress"])
        names = {"compress.hashing", "compress.compressing", "compress.verifying"}
        assert names <= set(compression)
        for span in (*parts.values(), *compression.values()):
            assert startup.start_time_unix_nano <= span.start_time_unix_nano
            assert span.end_time_unix_nano <= startup.end_time_unix_nano

        stub = InferenceServiceStub(channel)
        request = pb.GenerateStreamRequest(text=PROMPT, stopping=pb.Stopping(max_tokens=8))
        metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
        list(stub.GenerateStream(request, metadata=metadata))
        span = receiver.wait_for(method)
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
        assert span.kind == Span.SPAN_KIND_SERVER
        phases = receiver.children(span)
        assert list(phases) == ["tokenize", "queue", "prefill", "decode"]
        starts = [phases[name].start_time_unix_nano for name in phases]
        assert starts == sorted(starts)
        assert span.start_time_unix_nano <= starts[0]
        assert phases["decode"].end_time_unix_nano <= span.end_time_unix_nano
        found = attributes(span)
        assert found["rpc.response.status_code"] == "OK"
        assert found["gen_ai.request.model"] == "venturi-mini"
        assert found["gen_ai.usage.output_tokens"] == 8
        assert PROMPT not in str(receiver.spans)

        call = stub.GenerateStream(
            pb.GenerateStreamRequest(
                text=PROMPT, stopping=pb.Stopping(max_tokens=400, ignore_eos=True)
            )
        )
        next(call)
        call.cancel()
        with pytest.raises(grpc.RpcError):
            stub.GenerateStream(request, timeout=1e-4).__next__()
        receiver.spans.clear()
        with pytest.raises(grpc.RpcError):
            stub.Generate(pb.GenerateRequest())
        failed = receiver.wait_for("venturi.v1.InferenceService/Generate")
        assert failed.status.code == Status.STATUS_CODE_ERROR
        assert attributes(failed)["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert "detach" not in server.output


def test_a_cancelled_call_is_recorded_as_cancelled(cache_dir: Path, receiver: Receiver) -> None:
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.port}",  # type: ignore[attr-defined]
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "VENTURI_CPU_ISA": "portable",  # slow enough to be interrupted
    }
    with (
        ServerProcess("--cache-dir", str(cache_dir), env=env) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = InferenceServiceStub(channel)
        stopping = pb.Stopping(max_tokens=400, ignore_eos=True)
        call = stub.GenerateStream(pb.GenerateStreamRequest(text="hi", stopping=stopping))
        next(call)
        call.cancel()
        span = receiver.wait_for("venturi.v1.InferenceService/GenerateStream")
        assert attributes(span)["rpc.response.status_code"] == "CANCELLED"
        assert span.status.code == Status.STATUS_CODE_ERROR
        receiver.spans.clear()
        with pytest.raises(grpc.RpcError):
            list(
                stub.GenerateStream(
                    pb.GenerateStreamRequest(text="hi", stopping=stopping), timeout=0.05
                )
            )
        span = receiver.wait_for("venturi.v1.InferenceService/GenerateStream")
        assert attributes(span)["rpc.response.status_code"] == "DEADLINE_EXCEEDED"


def test_a_missing_receiver_disturbs_nobody(tmp_path: Path) -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    with (
        ServerProcess("--cache-dir", str(tmp_path), "--recipe", "none", env=env) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        request = pb.GenerateRequest(text="hi", stopping=pb.Stopping(max_tokens=4))
        assert InferenceServiceStub(channel).Generate(request).choices[0].token_ids
        server.process.terminate()
        assert server.process.wait(timeout=10) == 0
