"""What both clients share: where to call, and what goes with each call."""

import os
import sys
import threading
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, TypeVar

import grpc

from venturi._channel import Stubs, channel_options, open_stubs
from venturi._requests import Call, check_timeout

T = TypeVar("T")

DEFAULT_TARGET = "127.0.0.1:50051"


class BaseClient:
    """A channel that is opened at the first call, and its settings."""

    _transport: Any  # the module grpc or grpc.aio

    def __init__(
        self,
        target: str | None = None,
        *,
        timeout: float | None = 600.0,
        max_retries: int = 2,
        secure: bool = False,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Stores the settings; nothing is sent.

        Args:
            target: Address as gRPC knows it, such as ``host:port`` or ``dns:///name:port``.
                Default: the environment's VENTURI_TARGET, else 127.0.0.1:50051.
            timeout: Seconds that a call may take, where it says nothing else; None is no limit.
            max_retries: Further attempts (at most 4) while the server is UNAVAILABLE. gRPC
                makes them, and none once a response has begun.
            secure: Uses TLS with the system's root certificates.
            credentials: Uses TLS with these credentials.
            metadata: Headers of each call, such as ``{"authorization": "Bearer ..."}``.
        """
        self.target = target or os.environ.get("VENTURI_TARGET") or DEFAULT_TARGET
        check_timeout(timeout)
        self.timeout = timeout
        self._options = channel_options(max_retries)
        if credentials is None and secure:
            credentials = grpc.ssl_channel_credentials()
        self._credentials = credentials
        self._metadata = dict(metadata or {})
        self._channel: Any = None
        self._stubs: Stubs | None = None
        self._closed = False
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.target}{' closed' if self._closed else ''}>"

    def _connected(self) -> Stubs:
        if self._closed:
            raise RuntimeError("The client is closed.")
        with self._lock:
            if self._stubs is None:
                self._channel = self._dial()
                self._stubs = open_stubs(self._channel)
            return self._stubs

    def _dial(self) -> Any:
        if self._credentials is None:
            return self._transport.insecure_channel(self.target, self._options)
        return self._transport.secure_channel(self.target, self._credentials, self._options)

    def _send(self, call: Call[T]) -> Any:
        """Starts a call. What comes back is gRPC's, and awaitable where the channel is aio."""
        headers = {**_trace_headers(), **self._metadata, **call.metadata}
        return attrgetter(call.method)(self._connected())(
            call.request,
            timeout=self.timeout if call.timeout is None else call.timeout,
            metadata=tuple((name.lower(), value) for name, value in headers.items()),
        )


def _trace_headers() -> dict[str, str]:
    """``traceparent`` of the active OpenTelemetry span, in a program that uses OpenTelemetry."""
    headers: dict[str, str] = {}
    if "opentelemetry.trace" in sys.modules:
        from opentelemetry import propagate

        propagate.inject(headers)
    return headers
