"""The automatic recipe beside uniform INT4 at no more bytes: KL to the original on held-out text.

    python -m bench.auto [--model DIR] [--calibration TEXT...] [--data TEXT...] [--quick]

Uniform recipes are GPTQ with scales by the least squared error, as the automatic one's are, on the
same calibration text and with the same int8 activations, head and KV cache. All artefacts run
through the engine as they are served. Bytes are those of the targeted weights, scales and zero
points included. Groups of 16 are at exactly 5 bits; only torch's kernels multiply them, slowly.
A difference is KL(auto) - KL(uniform) per token, with its paired 95 % bootstrap over documents: the
claim holds where the upper end is below 0 and auto takes no more bytes.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bench.quality import EMBEDDED, TEXTS, TOPICS
from bench.serve import commit
from compress.auto.config import Auto
from compress.auto.resolve import resolve_auto
from compress.documents import context_length
from compress.manifest import Manifest
from compress.measure.figures import Estimate
from compress.measure.intervals import Floats, ratio_estimate
from compress.measure.sides import open_pair
from compress.measure.statistics import compare
from compress.measure.text import EvaluationText, read_files
from compress.pipeline import compress
from compress.progress import NoProgress
from compress.recipe import Calibration, Modifier, Recipe, resolve
from engine.scoring import Scorer

UNIFORM = {
    "int4 g32": (32, True),
    "int4 g32 zero points": (32, False),
    "int4 g16": (16, True),
}
# (uniform, bits that auto may have; None: the uniform one's bytes)
RIVALS: list[tuple[str, float | None]] = [
    ("int4 g16", 5.0),
    ("int4 g32", None),
    ("int4 g32 zero points", None),
]


@dataclass(frozen=True, slots=True)
class Side:
    """An artefact: bytes and bits of its targeted weights, KL of each document, seconds."""

    nbytes: int
    bits: float
    kl_D: Floats
    seconds: float


@dataclass(frozen=True, slots=True)
class Contest:
    """Auto against a uniform recipe."""

    name: str
    auto: Side
    uniform: Side
    difference: Estimate

    @property
    def holds(self) -> bool:
        """Less KL, beyond the interval, at no more bytes."""
        return self.difference.high < 0 and self.auto.nbytes <= self.uniform.nbytes

    def row(self, tokens: float) -> str:
        """A line of the table."""
        a, b, d = self.auto, self.uniform, self.difference
        before, after = b.kl_D.sum() / tokens, a.kl_D.sum() / tokens
        return (
            f"| {self.name} | {b.bits:.3f} | {b.nbytes} | {before:.5f} | {a.bits:.3f} | {a.nbytes} "
            f"| {after:.5f} | {d.value:+.5f} ({d.low:+.5f} to {d.high:+.5f}) "
            f"| {'yes' if self.holds else 'NO'} | {a.seconds:.0f} |"
        )


HEAD = (
    "| uniform | bits | bytes | its KL | auto's bits | bytes | auto's KL | difference (95 %) "
    "| less at no more bytes | auto, s |\n|---|---|---|---|---|---|---|---|---|---|"
)


class Bench:
    """One model, calibration text and held-out text."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._model: Path = arguments.model
        self._folder = folder
        quick = arguments.quick
        documents = 24 if quick else arguments.documents
        window = min(arguments.length, context_length(self._model))
        self.text: EvaluationText = read_files(
            self._model, arguments.data, window=window, limit=documents, seed=0
        )
        self.tokens_D = np.array([len(ids) - 1 for ids in self.text.documents], np.float64)
        self._calibration = Calibration(
            source="file",
            paths=tuple(map(str, arguments.calibration)),
            samples=16 if quick else 128,
            length=min(128 if quick else 256, window),
        )
        self._swaps = 0 if quick else Auto(budget="bits", limit=5.0).swaps

    def contest(self, name: str, bits: float | None) -> Contest:
        """Auto at ``bits``, or at the bytes of the uniform recipe ``name``."""
        group_size, symmetric = UNIFORM[name]
        modifier = Modifier(
            type="gptq", scheme="w4a8", group_size=group_size, symmetric=symmetric,
            scale="mse", actorder="static",
        )  # fmt: skip
        base = replace(resolve("auto"), calibration=self._calibration)
        uniform = self._side(name, replace(base, auto=None, modifiers=(modifier,)))
        budget = Auto(budget="bytes", limit=float(uniform.nbytes), swaps=self._swaps)
        if bits is not None:
            budget = replace(budget, budget="bits", limit=bits)
        auto = self._side(f"auto for {name}", replace(base, auto=budget))
        difference = ratio_estimate(auto.kl_D - uniform.kl_D, self.tokens_D)
        return Contest(name, auto, uniform, difference)

    def _side(self, name: str, recipe: Recipe) -> Side:
        out, begin = self._folder / name.replace(" ", "-"), time.perf_counter()
        recipe = resolve_auto(recipe, self._model, self._folder / "cache", NoProgress())
        manifest = compress(recipe, self._model, out)
        seconds = time.perf_counter() - begin
        rounded = touched(manifest)
        weights = sum(8 * row_bytes / row_bits for row_bytes, row_bits in rounded)
        nbytes = sum(row_bytes for row_bytes, _ in rounded)
        return Side(nbytes, 8 * nbytes / weights, self._score(out), seconds)

    def _score(self, artefact: Path) -> Floats:
        window = self.text.window
        with open_pair(
            self._model, artefact, window=window, kv_dtype="auto", scorer=Scorer
        ) as pair:
            original, changed = pair
            sums = [
                compare(original.logits(list(ids)), changed.logits(list(ids)), torch.tensor(ids))
                for ids in self.text.documents
            ]
        return np.array([one.kl for one in sums], np.float64)


def touched(manifest: Manifest) -> list[tuple[int, float]]:
    """Bytes and bits of all linears but the head, whether rounded or left."""
    return [(row.bytes, row.bits) for row in manifest.layers if row.name != "lm_head"]


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> tuple[float, list[Contest]]:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder))
        tokens = float(bench.tokens_D.sum())
        say(f"{tokens:.0f} held-out tokens of {len(bench.tokens_D)} documents; commit {commit()}\n")
        say(HEAD)
        contests = []
        for name, bits in RIVALS[: 1 if arguments.quick else None]:
            contests.append(bench.contest(name, bits))
            say(contests[-1].row(tokens))
        return tokens, contests


def figures(tokens: float, contests: Sequence[Contest]) -> dict[str, object]:
    found: dict[str, object] = {"commit": commit(), "eval_tokens": int(tokens)}
    for one in contests:
        key = f"auto_vs_{one.name.replace(' ', '_')}"
        found[f"{key}_kl_difference"] = one.difference.value
        found[f"{key}_low"], found[f"{key}_high"] = one.difference.low, one.difference.high
        found[f"{key}_kl_ratio"] = float(one.auto.kl_D.sum() / one.uniform.kl_D.sum())
        found[f"{key}_bytes"] = [one.auto.nbytes, one.uniform.nbytes]
        found[f"{key}_holds"] = one.holds
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    calibration = [TEXTS / "train" / f"{topic}.txt" for topic in TOPICS]
    held_out = [TEXTS / f"{topic}-val.txt" for topic in TOPICS]
    parser.add_argument("--calibration", type=Path, nargs="+", default=calibration, metavar="TEXT")
    parser.add_argument("--data", type=Path, nargs="+", default=held_out, help="held-out text")
    parser.add_argument("--documents", type=int, default=160)
    parser.add_argument("--length", type=int, default=256, help="tokens of a document")
    parser.add_argument("--quick", action="store_true", help="one rival, little text, no swaps")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if missing := [str(p) for p in (*arguments.calibration, *arguments.data) if not p.is_file()]:
        parser.error(f"there is no {missing[0]}: name text with --calibration and --data")
    tokens, contests = run(arguments, lambda line: print(line, flush=True))
    if arguments.json is not None:
        text = json.dumps(figures(tokens, contests), indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
