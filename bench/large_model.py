"""Compressing a Llama of 1.1 billion weights: seconds, and private memory above the baseline.

    python -m bench.large_model [--quick] [--json FILE] [--blocks N] [--samples N] [--folder DIR]

Random bfloat16 weights of model L (``bench.cpu_models``), compressed by ``python -m compress``,
each time in a process of its own, whose seconds are given: once whole to INT8, rounded to nearest;
then to INT4 by GPTQ with one and with ``--blocks`` decoder layers, from which the seconds of all
layers are extrapolated. Memory is the peak of RssAnon less what it was after the imports; that of
GPTQ does not grow with the number of layers, since one is in memory at a time. ``--quick`` takes
model S and little text: it shows that the bench works, not the figures.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from bench.cpu_models import SHAPES, write_model
from bench.serve import commit

MODEL, QUICK_MODEL = "L", "S"
GPTQ = """version: 1
calibration: {{source: file, path: {text}, samples: {samples}, length: {length}}}
head: int8
modifiers:
  - {{type: gptq, scheme: w4a8, group_size: 32, scale: mse, actorder: static, targets: ["*"],
     ignore: [lm_head]}}
kv_cache: {{dtype: int8}}
gate: {{mode: off}}
"""


def compress(model: Path, recipe: str, out: Path) -> tuple[float, int]:
    """Seconds, and bytes at the peak above the baseline. Raises ``RuntimeError``."""
    command = [sys.executable, "-m", "compress", str(model), "--recipe", recipe]
    command += ["--out", str(out), "--progress", "json"]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-800:])
    last = json.loads(done.stdout.splitlines()[-1])
    return seconds, last["peak_rss_anon_bytes"] - last["baseline_rss_anon_bytes"]


def calibration_text(file: Path, tokens: int, vocabulary: int) -> None:
    """Random words of the model's tokenizer, in documents of a hundred."""
    rng, top = random.Random(0), vocabulary
    documents = [
        " ".join(f"t{rng.randrange(16, top)}" for _ in range(100)) for _ in range(tokens // 100 + 1)
    ]
    file.write_text("\0".join(documents), encoding="utf-8")


def measure(given: argparse.Namespace, work: Path) -> dict[str, object]:
    name = QUICK_MODEL if given.quick else MODEL
    shape = SHAPES[name]
    whole = write_model(shape, given.folder / name)
    say(f"{shape.layers} layers, INT8")
    rtn, rtn_bytes = compress(whole, "w8a8", work / "int8")
    calibration_text(work / "text.txt", given.samples * given.length, shape.vocabulary)
    recipe = work / "gptq.yaml"
    recipe.write_text(
        GPTQ.format(text=work / "text.txt", samples=given.samples, length=given.length),
        encoding="utf-8",
    )
    seconds, peaks = {}, []
    for layers in (1, given.blocks):
        say(f"{layers} layers, INT4 by GPTQ")
        model = write_model(replace(shape, layers=layers), work / f"{layers}-layers")
        seconds[layers], peak = compress(model, str(recipe), work / f"int4-{layers}")
        peaks.append(peak)
    each = (seconds[given.blocks] - seconds[1]) / (given.blocks - 1)
    return {
        "commit": commit(),
        "model": name,
        "int8_rtn_seconds": rtn,
        "int8_rtn_peak_mb": rtn_bytes / 1e6,
        "int4_gptq_tokens": given.samples * given.length,
        "int4_gptq_seconds_each_layer": each,
        "int4_gptq_seconds_extrapolated": seconds[1] + (shape.layers - 1) * each,
        "int4_gptq_peak_mb": max(peaks) / 1e6,
        f"int4_gptq_{given.blocks}_layers_seconds": seconds[given.blocks],
    }


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under a minute: model S, little text")
    parser.add_argument("--blocks", type=int, default=3, help="decoder layers for GPTQ, from 2")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sample")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="keeps the model")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.quick:
        given.blocks, given.samples, given.length = 6, 16, 256
    with tempfile.TemporaryDirectory() as work:
        figures = measure(given, Path(work))
    for name, value in figures.items():
        print(f"{name:32} {value:.1f}" if isinstance(value, float) else f"{name:32} {value}")
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
