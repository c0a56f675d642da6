"""The gRPC edge: grpc.aio on uvloop. Knows engine's public surface and the stubs; no torch."""

from importlib.metadata import version

__version__ = version("venturi-server")
