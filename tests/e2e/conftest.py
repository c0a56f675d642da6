"""Real servers as child processes. VENTURI_TEST_KV_BLOCKS sets the size of their KV pool."""

import os
from collections.abc import Iterator
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
