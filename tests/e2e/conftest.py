"""Real servers as child processes. VENTURI_TEST_KV_BLOCKS sets the size of their KV pool."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from server.testing import ServerProcess

BLOCKS = os.environ.get("VENTURI_TEST_KV_BLOCKS", "")
POOL = ("--kv-blocks", BLOCKS) if BLOCKS else ()


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One artefact cache for the whole run: the embedded model is compressed once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def pool() -> tuple[str, ...]:
    """Flags that make the KV pool as small as this run wants it."""
    return POOL


@pytest.fixture(scope="session")
def server(cache_dir: Path) -> Iterator[ServerProcess]:
    """A server of the embedded model; tests leave it idle."""
    with ServerProcess("--cache-dir", str(cache_dir), *POOL) as process:
        yield process


@pytest.fixture
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    """A channel to ``server``."""
    with grpc.insecure_channel(server.target) as channel:
        yield channel


@pytest.fixture(scope="session")
def slow(cache_dir: Path) -> Callable[..., ServerProcess]:
    """Makes servers that take seconds for 480 tokens, so that a test can do something to a
    request that runs. A small pool has room for one of 480 tokens."""
    flags = "--speculative-tokens", "0", *(("--kv-blocks", "32") if BLOCKS else ())
    return lambda *more: ServerProcess(
        "--cache-dir", str(cache_dir), *flags, *more, env={"VENTURI_CPU_ISA": "portable"}
    )


@pytest.fixture(scope="session")
def slow_server(slow: Callable[..., ServerProcess]) -> Iterator[ServerProcess]:
    """One of these; tests leave it idle."""
    with slow() as process:
        yield process
