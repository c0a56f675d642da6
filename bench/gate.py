"""What the gate says of each preset, and how long that takes.

    python -m bench.gate [--model DIR] [--recipes NAME...] [--quick] [--json FILE]

Each preset is compressed into a folder that is thrown away, judged cold (text, both models), and
judged again with everything found in the cache. Calibration is cut down with --quick, so that
the figures of calibrated presets are worse there than in earnest.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from compress.cache import compress_cached
from compress.gate.config import Gate
from compress.gate.judging import Judge
from compress.gate.report import Report
from compress.progress import NoProgress
from compress.recipe import presets, resolve

EMBEDDED = Path(__file__).parents[1] / "server" / "assets" / "venturi-mini"
QUICK = ("w8a8", "w8a16", "w4a16-rtn", "w4a8", "sparse24-w8a8", "sparse50-w4a8")


@dataclass(frozen=True, slots=True)
class Row:
    """One preset; times in seconds."""

    recipe: str
    report: Report
    compress_s: float
    cold_s: float
    warm_s: float

    def markdown(self) -> str:
        """A line of the table."""
        quality, (check, *_) = self.report.evaluation.quality, self.report.verdict.checks
        assert quality is not None
        before, after = self.report.evaluation.original, self.report.evaluation.artefact
        return (
            f"| {self.recipe} | {self.report.verdict.outcome.value} "
            f"| {check.value:.5f} ({check.low:.5f} to {check.high:.5f}) "
            f"| {quality.perplexity_ratio.value:.4f} | {100 * quality.flips.value:.1f} "
            f"| {after.weight_bytes / before.weight_bytes:.2f} "
            f"| {self.compress_s:.1f} | {self.cold_s:.2f} | {self.warm_s:.3f} |"
        )


HEAD = (
    "| preset | verdict | KL, nats per token (95 %) | perplexity x | flips, % | memory x "
    "| compress, s | verdict cold, s | warm, s |\n|---|---|---|---|---|---|---|---|---|"
)


def judge_preset(name: str, model: Path, cache: Path, gate: Gate, *, quick: bool) -> Row:
    recipe = resolve(name)
    if quick and recipe.calibration is not None:
        recipe = replace(recipe, calibration=replace(recipe.calibration, samples=16, length=64))
    start = time.perf_counter()
    artefact = compress_cached(recipe, model, cache, NoProgress()).artefact
    compressed = time.perf_counter()
    judge = Judge(
        original=model,
        gate=gate,
        seed=0,
        kv_dtype="auto",
        cache_dir=cache,
        progress=NoProgress(),
    )
    report = judge.report(artefact)
    judged = time.perf_counter()
    judge.report(artefact)
    times = (compressed - start, judged - compressed, time.perf_counter() - judged)
    return Row(name, report, *times)


def figures(rows: list[Row]) -> dict[str, object]:
    found: dict[str, object] = {}
    for row in rows:
        check = row.report.verdict.checks[0]
        key = row.recipe.replace("-", "_")
        found[f"{key}_verdict"] = row.report.verdict.outcome.value
        found[f"{key}_kl"] = check.value
        found[f"{key}_kl_low"], found[f"{key}_kl_high"] = check.low, check.high
        found[f"{key}_cold_s"], found[f"{key}_warm_s"] = row.cold_s, row.warm_s
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    parser.add_argument("--recipes", nargs="+", help="presets; default: all of them")
    parser.add_argument("--documents", type=int, default=Gate().documents)
    parser.add_argument("--quick", action="store_true", help="few presets, little calibration")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    gate = Gate(mode="warn", documents=arguments.documents)
    names = arguments.recipes or (QUICK if arguments.quick else presets())
    print(f"limit: {gate.max_kl} nats per token; {gate.documents} documents of {gate.length}\n")
    print(HEAD)
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for name in names:
            row = judge_preset(name, arguments.model, Path(cache), gate, quick=arguments.quick)
            rows.append(row)
            print(row.markdown(), flush=True)
    print()
    for row in rows:
        print(f"- {row.recipe}: {row.report.line()}.")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures(rows), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
