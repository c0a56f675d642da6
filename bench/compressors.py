"""Venturi's compression beside llm-compressor's: held-out loss and seconds at the same settings.

    python -m bench.compressors [--quick] [--json FILE] [--peers-folder DIR] [--keep DIR]
        [--only NAME...]

Both get the same model in float32, the same calibration ids in steps of as many tokens, the same
grid (groups of 32, symmetric, float32 scales), damping 0.01, static activation order and candidate
scales, and keep head and embedding. One evaluator runs the weights of both with float32
activations. Each turn draws other calibration text; the sides compress one after the other.
Differences are paired, with 95 % bootstrap intervals over documents and turns. Seconds are of
calibration and compression, without loading and saving, after a warm-up. ``--json`` is written
after each turn. With ``--keep``, llm-compressor does not run again where all of the same was asked
before; of the times only the seconds of CPU can be compared then.
``make bench-peers`` sets llm-compressor up.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from bench.quality import EMBEDDED, RESAMPLES, TEXTS, TOPICS, Held, compress_model, held_out
from bench.serve import commit
from compress.block import LinearSteps
from compress.calibration import read_samples
from compress.methods.awq import Awq
from compress.methods.gptq import Gptq
from compress.methods.masks import Sparsity
from compress.methods.rtn import Rtn
from compress.methods.scheme import Scheme
from compress.methods.sparsegpt import SparseGpt
from engine.blocks import Blocks
from engine.formats.checkpoint import Checkpoint

SCRIPT = Path(__file__).parent / "peers" / "run_llmcompressor.py"
# What Venturi runs through a layer at once, and llm-compressor is told to.
STEP_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One method on both sides; ``sparsity`` and ``structure`` are a pruner's, the rest a
    quantiser's. ``rtn`` is the control: both sides give the same. ``clip`` is Venturi's alone: AWQ
    as its recipes have it, beside the same of llm-compressor's, which has no clipping."""

    method: str
    bits: int = 4
    group_size: int = 32
    scale: str = "absmax"
    clip: bool = False
    sparsity: float = 0.5
    structure: str = "unstructured"

    @property
    def name(self) -> str:
        """For tables and folders."""
        if self.method == "sparsegpt":
            return f"sparsegpt {'50 %' if self.structure == 'unstructured' else self.structure}"
        suffix = "+clip" if self.clip else "+mse" if self.scale == "mse" else ""
        return f"int{self.bits} {self.method}{suffix}"

    @property
    def steps(self) -> LinearSteps:
        """Venturi's."""
        if self.method == "sparsegpt":
            sparsity = Sparsity(share=self.sparsity, structure=self.structure)
            return LinearSteps(pruner=SparseGpt(sparsity))
        grid = Scheme(
            bits=self.bits,
            group_size=self.group_size,
            scale=self.scale,  # type: ignore[arg-type]
            dtype=torch.float32,
        )
        if self.method == "awq":
            awq = Awq(grid, clip=self.clip)
            return LinearSteps(scalings=(awq,), quantiser=awq)
        return LinearSteps(quantiser={"rtn": Rtn, "gptq": Gptq}[self.method](grid))


SETTINGS = [
    Setting(method="rtn"),
    *(Setting(method="gptq", bits=b, scale=s) for b in (4, 3) for s in ("absmax", "mse")),
    Setting(method="awq"),
    Setting(method="awq", clip=True),
    Setting(method="awq", bits=3),
    Setting(method="sparsegpt"),
    Setting(method="sparsegpt", structure="2:4"),
]
QUICK = ["int4 rtn", "int4 gptq", "sparsegpt 2:4"]


@dataclass
class Side:
    """What one side gave for a setting, turn by turn; ``nll`` has a sum for each document."""

    nll: list[NDArray[np.float64]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def perplexity(self, held: Held) -> float:
        """Over all turns."""
        return float(np.exp(np.stack(self.nll).mean(0).sum() / held.tokens_D.sum()))


@dataclass
class Pair:
    """Both sides of a setting."""

    ours: Side = field(default_factory=Side)
    theirs: Side = field(default_factory=Side)

    def difference(self, held: Held) -> tuple[float, float, float]:
        """Ours less theirs in nats per token, with its interval over turns and documents."""
        difference_TD = np.stack(self.ours.nll) - np.stack(self.theirs.nll)
        turns, documents = difference_TD.shape
        rng = np.random.default_rng(0)
        mean_RD = difference_TD[rng.integers(turns, size=(RESAMPLES, turns))].mean(1)
        draws_RD = rng.integers(documents, size=(RESAMPLES, documents))
        sums_R = np.take_along_axis(mean_RD, draws_RD, 1).sum(1)
        low, high = np.quantile(sums_R / held.tokens_D[draws_RD].sum(1), [0.025, 0.975])
        return float(difference_TD.mean(0).sum() / held.tokens_D.sum()), float(low), float(high)

    def times(self, name: str) -> tuple[float, float, float]:
        """Medians of ours and theirs, and how many times ours theirs is."""
        ours = statistics.median(getattr(self.ours, name))
        theirs = statistics.median(getattr(self.theirs, name))
        return ours, theirs, theirs / ours


class Bench:
    """The model, the text, and one turn of either side."""

    def __init__(self, given: argparse.Namespace) -> None:
        self._given = given
        self._blocks = Blocks.open(Checkpoint.open(given.model))
        self._settings = [setting for setting in SETTINGS if setting.name in given.only]
        self.held = held_out(given.model, given.data, given.documents, given.length)
        self.original = Side([self._nll({})])
        self.pairs = {setting.name: Pair() for setting in self._settings}

    def turn(self, seed: int) -> None:
        """Both sides on calibration text drawn by ``seed``."""
        given = self._given
        ids_SL = read_samples(
            given.model, given.calibration, samples=given.samples, length=given.length, seed=seed
        )
        self._say(seed, "llm-compressor")
        self._theirs(seed, ids_SL)
        self._say(seed, "Venturi")
        self._ours(ids_SL)

    def _ours(self, ids_SL: Tensor) -> None:
        few_SL = ids_SL[: max(1, STEP_TOKENS // ids_SL.shape[1])]
        compress_model(self._blocks, few_SL, self._settings[0].steps)  # warms up
        for setting in self._settings:
            begin, cpu = time.perf_counter(), time.process_time()
            changed, _, _ = compress_model(self._blocks, ids_SL, setting.steps)
            seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
            self._add(self.pairs[setting.name].ours, changed, seconds, cpu_seconds)

    def _theirs(self, seed: int, ids_SL: Tensor) -> None:
        with tempfile.TemporaryDirectory() as name:
            kept = self._given.keep
            work = Path(name) if kept is None else kept / str(seed)
            for line in self._run(work, ids_SL):
                changed = by_layer(load_file(work / "out" / f"{line['name']}.safetensors"))
                side = self.pairs[str(line["name"])].theirs
                self._add(side, changed, float(line["seconds"]), float(line["cpu_seconds"]))

    def _run(self, work: Path, ids_SL: Tensor) -> list[dict[str, str]]:
        """Its lines, kept where the same was asked. Raises ``RuntimeError`` with its last words."""
        given = self._given
        python = given.peers_folder / "llmcompressor" / "bin" / "python"
        if not python.is_file():
            raise RuntimeError(f"there is no {python}: run make bench-peers")
        described = [{"name": setting.name, **asdict(setting)} for setting in self._settings]
        asked = {
            "ids.json": json.dumps(ids_SL.tolist()),
            "settings.json": json.dumps(described),
            "run.json": json.dumps([str(given.model.resolve()), str(python), given.threads]),
        }
        lines = work / "lines"
        if lines.is_file() and all(
            (work / n).is_file() and (work / n).read_text("utf-8") == t for n, t in asked.items()
        ):
            return _json_lines(lines.read_text("utf-8"))
        lines.unlink(missing_ok=True)
        shutil.rmtree(work / "out", ignore_errors=True)
        for name, text in asked.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_text(text, encoding="utf-8")
        command = [
            *(str(python), str(SCRIPT), "--model", str(given.model), "--out", str(work / "out")),
            *("--ids", str(work / "ids.json"), "--settings", str(work / "settings.json")),
            *("--batch", str(max(1, STEP_TOKENS // ids_SL.shape[1]))),
            *("--threads", str(given.threads)),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise RuntimeError(f"llm-compressor: {done.stderr.strip()[-800:]}")
        lines.write_text(done.stdout, encoding="utf-8")
        return _json_lines(done.stdout)

    def _add(
        self, side: Side, changed: dict[int, dict[str, Tensor]], seconds: float, cpu: float
    ) -> None:
        side.nll.append(self._nll(changed))
        side.seconds.append(seconds)
        side.cpu_seconds.append(cpu)

    def _nll(self, changed: dict[int, dict[str, Tensor]]) -> NDArray[np.float64]:
        return self.held.score(self._blocks, changed, None)[0].nll_D

    def _say(self, seed: int, side: str) -> None:
        print(f"turn {seed + 1} of {self._given.repeats}: {side}", file=sys.stderr, flush=True)


def _json_lines(text: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def by_layer(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Tensors of decoder layers by their layer's index; others are left out."""
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if found := re.search(r"\blayers\.(\d+)\.", name):
            layers.setdefault(int(found[1]), {})[name] = tensor
    return layers


def table(bench: Bench) -> Iterator[str]:
    held = bench.held
    columns = ("setting", "perplexity", "theirs", "nats above it", "95 %", "worse", "s", "CPU s")
    yield f"| {' | '.join(columns)} |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, pair in bench.pairs.items():
        value, low, high = pair.difference(held)
        perplexities = f"{pair.ours.perplexity(held):.4f} | {pair.theirs.perplexity(held):.4f}"
        interval = f"{value:+.4f} | {low:+.4f} to {high:+.4f} | {'YES' if low > 0 else 'no'}"
        times = " | ".join(
            f"{ours:.1f}, {theirs:.1f}: x {ratio:.2f}"
            for ours, theirs, ratio in map(pair.times, ("seconds", "cpu_seconds"))
        )
        yield f"| {name} | {perplexities} | {interval} | {times} |"
    yield ""
    tokens = f"{int(held.tokens_D.sum())} tokens of {len(held.tokens_D)} documents"
    yield f"{tokens}; original perplexity {bench.original.perplexity(held):.4f}"


def figures(bench: Bench) -> dict[str, object]:
    held = bench.held
    values: dict[str, object] = {
        "commit": commit(), "fp32_ppl": bench.original.perplexity(held)
    }  # fmt: skip
    for name, pair in bench.pairs.items():
        values[name] = {
            "ppl": pair.ours.perplexity(held),
            "llmcompressor_ppl": pair.theirs.perplexity(held),
            "difference": pair.difference(held),
            "seconds": pair.times("seconds"),
            "cpu_seconds": pair.times("cpu_seconds"),
        }
    return values


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    calibration = [TEXTS / "train" / f"{topic}.txt" for topic in TOPICS]
    data = [TEXTS / f"{topic}-val.txt" for topic in TOPICS]
    parser.add_argument("--calibration", type=Path, nargs="+", default=calibration, metavar="TEXT")
    parser.add_argument("--data", type=Path, nargs="+", default=data, help="held-out text")
    parser.add_argument("--documents", type=int, default=160)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256, help="tokens of a document or sample")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--quick", action="store_true", help="few settings, little text")
    names = [setting.name for setting in SETTINGS]
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--threads", type=int, default=1, help="1 is best for small models")
    parser.add_argument("--peers-folder", type=Path, default=Path("build/peers"))
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="llm-compressor's results for this model stay there",
    )
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.quick:
        given.only, given.documents, given.samples, given.repeats = QUICK, 60, 32, 1
    if missing := [str(p) for p in (*given.calibration, *given.data) if not p.is_file()]:
        parser.error(f"there is no {missing[0]}: name text with --calibration and --data")
    return given


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    bench = Bench(given)
    for seed in range(given.repeats):
        bench.turn(seed)
        if given.json is not None:
            given.json.write_text(json.dumps(figures(bench), indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(bench)))


if __name__ == "__main__":
    main()
