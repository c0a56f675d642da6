"""What INT8 weights, head and KV cache cost, by the command that users have."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from server.config import EMBEDDED_MODEL

DATA = Path(__file__).parents[3] / "shared" / "data" / "dialogue-val.txt"


@pytest.mark.shared
@pytest.mark.skipif(not DATA.exists(), reason="needs the evaluation text")
def test_int8_costs_little(tmp_path: Path) -> None:
    """Perplexity within 1 %, mean KL at most 0.005 nats, on held-out dialogues."""
    venturi = Path(sys.executable).parent / "venturi"
    artefact, result = tmp_path / "w8a8", tmp_path / "result.json"
    compress = [venturi, "compress", EMBEDDED_MODEL, "--recipe", "w8a8", "--out", artefact]
    subprocess.run(compress, check=True, capture_output=True, timeout=60)
    evaluate = [venturi, "evaluate", artefact, "--against", EMBEDDED_MODEL, "--data", DATA]
    options = ["--documents", "40", "--json", result]
    done = subprocess.run([*evaluate, *options], check=True, capture_output=True, timeout=300)
    print(done.stdout.decode())
    figures = json.loads(result.read_text())
    assert (figures["artefact"]["weights"], figures["artefact"]["kv_dtype"]) == ("int8", "int8")
    assert (figures["original"]["weights"], figures["original"]["kv_dtype"]) == ("float32", "fp32")
    quality = figures["quality"]
    assert quality["tokens"] > 5000
    assert abs(quality["perplexity_ratio"]["value"] - 1) < 0.01
    assert quality["kl"]["value"] <= 0.005
