"""Peak private memory of a compression, measured in a child process."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

MB = 1 << 20
MAIN = """
import sys
from compress import artefact
from compress.cli import compress_command
artefact.SHARD_BYTES = int(sys.argv.pop())
compress_command()
"""


@pytest.fixture
def large_model(make_model: Callable[..., Path]) -> Path:
    """About 300 MB in 8 layers."""
    return make_model(layers=8, hidden=1024, mlp=4096, vocab=16384)


@pytest.mark.parametrize("shard_bytes", [512 * MB, 24 * MB])
def test_memory_is_bounded(large_model: Path, tmp_path: Path, shard_bytes: int) -> None:
    weights = (large_model / "model.safetensors").stat().st_size
    assert weights > 280 * MB
    arguments = [large_model, "--out", tmp_path / "out", "--progress", "json", shard_bytes]
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    event = json.loads(done.stdout.splitlines()[-1])
    above = event["peak_rss_anon_bytes"] - event["baseline_rss_anon_bytes"]
    output = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    # A shard, the largest tensor (32 MB) twice, and what the allocator keeps; whole it is 600 MB.
    assert above < min(shard_bytes, output) + 64 * MB + 96 * MB
