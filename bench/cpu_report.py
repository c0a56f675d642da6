"""bench/results/cpu.md: the tables, the targets and what was found, a plot for each model."""

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

from bench.cpu_engines import OURS, PEERS, Engine
from bench.cpu_models import SHAPES, matrix_weights
from bench.cpu_plot import plot
from bench.cpu_results import Measured, Results
from bench.cpu_server import STREAM_PROMPT
from bench.cpu_targets import Target, targets

_FIGURES = ("prefill", "decode1", "decode8", "decode32")


def write(results: Results, folder: Path) -> str:
    """Writes cpu.md and cpu-MODEL.svg into ``folder``; returns the text."""
    lines = [*_head(results)]
    for model in results.models:
        lines += ["", f"## Model {model}", "", _shape(model), "", *_speeds(results, model)]
        lines += ["", *_ratios(results, model)]
        if results.models[model]:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"cpu-{model}.svg").write_text(plot(results, model), encoding="utf-8")
            lines += ["", f"![tokens/s by batch](cpu-{model}.svg)"]
    lines += ["", "## Through gRPC", "", *_served(results)]
    lines += ["", "## Targets", "", *_targets(targets(results))]
    if results.failures:
        lines += ["", "## Failures", "", *_failures(results)]
    text = "\n".join(lines) + "\n"
    (folder / "cpu.md").write_text(text, encoding="utf-8")
    return text


def _head(results: Results) -> Iterator[str]:
    yield "# Speed on a CPU"
    yield ""
    yield "`python -m bench.cpu`: random weights, the same for all engines; greedy, prompts of"
    yield f"{results.prompt} tokens, {results.new} generated, {results.threads} threads; medians of"
    yield f"{results.repeats} interleaved repetitions, in brackets largest less smallest over the"
    yield "median. Decode is without the prefill part. How the peers are set up, and why that is"
    yield "fair, is in [bench/peers.md](../peers.md)."
    yield ""
    torch = importlib.metadata.version("torch")
    machine = f"{_cpu()}, {os.cpu_count()} cores, {platform.system()}"
    yield f"Commit {results.commit}; {machine}; torch {torch}."
    yield ""
    versions = {
        f"{engine}: {measured.version}; {_detail(measured)}"
        for engines in results.models.values()
        for engine, measured in engines.items()
    }
    yield from (f"- {version}" for version in sorted(versions))


def _detail(measured: Measured) -> str:
    hidden = {"threads", "weight_bytes"}
    shown = (f"{name} {value}" for name, value in measured.detail.items() if name not in hidden)
    return ", ".join(shown)


def _cpu() -> str:
    found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return found[1] if found else platform.machine()


def _shape(model: str) -> str:
    s = SHAPES[model]
    return (
        f"hidden {s.hidden}, {s.layers} layers, {s.heads}/{s.kv_heads} heads, MLP {s.mlp}, "
        f"vocabulary {s.vocabulary}; {matrix_weights(s) / 1e6:.0f} M weights in matrices."
    )


def _measured(results: Results, model: str) -> Iterator[tuple[Engine, Measured]]:
    known = results.models[model]
    for engine in [*OURS, *PEERS]:
        if engine.name in known:
            yield engine, known[engine.name]


def _cell(measured: Measured, name: str) -> str:
    if name not in measured.figures:
        return "-"
    value = measured.value(name)
    return f"{value:.{0 if value >= 100 else 1}f} ({measured.spread(name):.0%})"


def _speeds(results: Results, model: str) -> Iterator[str]:
    yield "| tokens/s | prefill | 1 | 8 | 32 | same greedy answers |"
    yield "|---|---|---|---|---|---|"
    reference = results.models[model].get("transformers fp32")
    for engine, measured in _measured(results, model):
        cells = [_cell(measured, f"{figure}_tps") for figure in _FIGURES]
        same = "-"
        if reference is not None:
            same = f"{measured.agreement(reference.tokens)} of {len(reference.tokens)}"
        yield f"| {engine.name} | {' | '.join(cells)} | {same} |"
    for name in results.failures.get(model, {}):
        if name not in results.models[model]:
            yield f"| {name} | failed | failed | failed | failed | - |"
    for engine, measured in _measured(results, model):
        if "dram_gb_s" in measured.figures:
            dram, int8 = measured.value("dram_gb_s"), measured.value("int8_gop_s")
            yield ""
            yield f"In the runs of {engine.name}: DRAM read {dram:.1f} GB/s, INT8 {int8:.0f} GOP/s."


def _ratios(results: Results, model: str) -> Iterator[str]:
    """Ours over the best peer of the same bits."""
    yield "| to the best peer of the same bits | prefill | 1 | 8 | 32 |"
    yield "|---|---|---|---|---|"
    everyone = list(_measured(results, model))
    for ours, measured in everyone:
        if not ours.recipe:
            continue
        rivals = [(e.name, m) for e, m in everyone if e.bits == ours.bits and not e.recipe]
        cells = [best_ratio(measured, rivals, f"{figure}_tps") for figure in _FIGURES]
        shown = [f"x {cell[0]:.2f} ({cell[1]})" if cell else "-" for cell in cells]
        yield f"| {ours.name} | {' | '.join(shown)} |"


def best_ratio(
    ours: Measured, rivals: list[tuple[str, Measured]], name: str
) -> tuple[float, str] | None:
    """Our figure over the best rival's, and who that is; None where nobody has one."""
    known = [(m.value(name), rival) for rival, m in rivals if name in m.figures]
    if name not in ours.figures or not known:
        return None
    best, rival = max(known)
    return ours.value(name) / best, rival


def _served(results: Results) -> Iterator[str]:
    yield f"Prompts of {STREAM_PROMPT} tokens, speculation off, default coalescing; tokens/s from"
    yield "the requests to the last token; in brackets the share of the engine's in process on the"
    yield "same work. The client's CPU is in cores, the memory is summed PSS."
    yield ""
    yield "| model | 1 | 8 | 32 | client's CPU at 32 | memory of all processes |"
    yield "|---|---|---|---|---|---|"
    for model in results.models:
        for engine, m in _measured(results, model):
            if "pss_bytes" not in m.figures:
                continue
            shares = [
                f"{m.value(f'grpc{batch}_tps'):.0f} ({m.value(f'grpc{batch}_share'):.1%})"
                for batch in (1, 8, 32)
            ]
            cpu, pss = m.value("grpc32_client_cpu"), m.value("pss_bytes") / 1e6
            yield f"| {model}, {engine.name} | {' | '.join(shares)} | {cpu:.2f} | {pss:.0f} MB |"


def _failures(results: Results) -> Iterator[str]:
    for model, engines in results.failures.items():
        for engine, message in engines.items():
            yield f"- {model}, {engine}: {' '.join(message.split())}"


def _targets(found: list[Target]) -> Iterator[str]:
    yield "| target | wanted | found | |"
    yield "|---|---|---|---|"
    for target in found:
        yield f"| {target.name} | {target.wanted_text} | {target.found_text} | {target.verdict} |"
