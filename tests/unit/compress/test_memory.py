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


def peak(code: str, arguments: list[object]) -> int:
    """Bytes above what the imports took, of a child that runs ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    event = json.loads(done.stdout.splitlines()[-1])
    return int(event["peak_rss_anon_bytes"] - event["baseline_rss_anon_bytes"])


@pytest.fixture
def large_model(make_model: Callable[..., Path]) -> Path:
    """About 300 MB in 8 layers."""
    return make_model(layers=8, hidden=1024, mlp=4096, vocab=16384)


@pytest.mark.parametrize("shard_bytes", [512 * MB, 24 * MB])
def test_memory_is_bounded(large_model: Path, tmp_path: Path, shard_bytes: int) -> None:
    weights = (large_model / "model.safetensors").stat().st_size
    assert weights > 280 * MB
    arguments = [large_model, "--out", tmp_path / "out", "--progress", "json", shard_bytes]
    above = peak(MAIN, arguments)
    output = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    # A shard, the largest tensor (32 MB) twice, and what the allocator keeps; whole it is 600 MB.
    assert above < min(shard_bytes, output) + 64 * MB + 96 * MB


# A calibrated run on random tokens, whose hidden states go to a file.
CALIBRATED = """
import torch
from compress import artefact, calibrated, sequential
from compress.cli import compress_command
artefact.SHARD_BYTES = 16 << 20
sequential.MAPPED_BYTES = 1 << 20
calibrated.generate = lambda *_, **__: torch.randint(0, 32768, (64, 64))
compress_command()
"""


def test_memory_of_a_calibrated_run_is_bounded(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = make_model(layers=2, hidden=1024, mlp=2048, vocab=65536)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "version: 1\ncalibration: {source: generate, samples: 64, length: 64}\n"
        "modifiers: [{type: gptq, scheme: w4a8}]\n"
    )
    arguments = [model, "--recipe", recipe, "--out", tmp_path / "out", "--progress", "json"]
    above = peak(CALIBRATED, arguments)
    layer = 4 * (4 * 1024 * 1024 + 3 * 1024 * 2048)
    # In float32 the embedding alone would take 256 MB.
    assert above < 2 * layer + 350 * MB


# Text written by the model, which is in memory as a whole for that.
GENERATED = """
import json, sys
from pathlib import Path
from compress.generated import generate
from compress.memory import PeakMemory
with PeakMemory() as memory:
    generate(Path(sys.argv[1]), samples=8, length=8, seed=0, int8_weights=True)
print(json.dumps({
    "peak_rss_anon_bytes": memory.peak, "baseline_rss_anon_bytes": memory.baseline
}))
"""


def test_memory_of_generating_is_that_of_the_model_in_int8(large_model: Path) -> None:
    weights = (large_model / "model.safetensors").stat().st_size // 2
    largest = 2 * 16384 * 1024
    # What is freed between packed matrices would more than double it.
    assert peak(GENERATED, [large_model]) < weights + 2 * largest + 50 * MB
