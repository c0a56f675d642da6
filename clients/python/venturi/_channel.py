"""How a channel is set up: retries, keepalive, message sizes, and the stubs on it."""

import json
from typing import NamedTuple

import grpc
import grpc.experimental
from grpc_health.v1.health_pb2_grpc import HealthStub

from venturi.v1.admin_pb2_grpc import AdminServiceStub
from venturi.v1.inference_pb2_grpc import InferenceServiceStub
from venturi.v1.model_pb2_grpc import ModelServiceStub

_MAX_ATTEMPTS = 5  # gRPC's own limit
_MIB = 1024 * 1024
_SERVICES = ("InferenceService", "ModelService", "AdminService")


def channel_options(max_retries: int) -> list[tuple[str, str | int]]:
    """Options for ``grpc.insecure_channel`` and its relatives."""
    return [
        ("grpc.service_config", json.dumps(service_config(max_retries))),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # A request may wait in the queue, with nothing sent, for longer than two pings.
        ("grpc.http2.max_pings_without_data", 0),
        # A server that has come back is found within seconds, not gRPC's two minutes.
        ("grpc.initial_reconnect_backoff_ms", 500),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        # Log probabilities are large; a request larger than the retry buffer is never retried.
        ("grpc.max_receive_message_length", 64 * _MIB),
        ("grpc.per_rpc_retry_buffer_size", 4 * _MIB),
        # Without it a synchronous stream whose retry cannot connect never gets a status.
        (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1),
        ("grpc.primary_user_agent", "venturi-python"),
    ]


def service_config(max_retries: int) -> dict[str, object]:
    """The gRPC service config: gRPC itself retries, until the response has begun.

    Health checks are not retried: their caller wants the present state.
    """
    if max_retries < 0:
        raise ValueError(f"max_retries is {max_retries}; it must be 0 or more")
    config: dict[str, object] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if max_retries:
        config["methodConfig"] = [
            {
                "name": [{"service": f"venturi.v1.{service}"} for service in _SERVICES],
                "retryPolicy": {
                    "maxAttempts": min(max_retries + 1, _MAX_ATTEMPTS),
                    "initialBackoff": "0.5s",
                    "maxBackoff": "8s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    return config


class Stubs(NamedTuple):
    """The services of one channel."""

    inference: InferenceServiceStub
    model: ModelServiceStub
    admin: AdminServiceStub
    health: HealthStub


def open_stubs(channel: grpc.Channel | grpc.aio.Channel) -> Stubs:
    """Stubs on a channel of either kind; its kind decides whether calls are awaited."""
    return Stubs(
        InferenceServiceStub(channel),
        ModelServiceStub(channel),
        AdminServiceStub(channel),
        HealthStub(channel),
    )
