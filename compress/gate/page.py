"""A report as one HTML page for people: no network, no scripts, no other files."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import msgspec

from compress.auto.config import Frontier
from compress.auto.plot import plot
from compress.errors import CompressError
from compress.gate.decision import Outcome
from compress.gate.layer_table import make_layers, make_table
from compress.gate.report import UNKNOWN_ORIGINAL, Report
from compress.gate.verdict import Check
from compress.measure.figures import GENERATED, Evaluation, Interval, TaskResult

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #f4f6f8; margin: 0; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; }
p { margin: .4rem 0; } .quiet { color: #5b6675; font-size: .92rem; }
.verdict { border-left: .5rem solid; border-radius: .4rem; padding: 1rem 1.25rem; margin: 1.25rem 0;
  background: #fff; }
.verdict b { font-size: 1.25rem; display: block; }
.pass { border-color: #1d8a4e; } .pass b { color: #146b3b; }
.fail { border-color: #c2362b; } .fail b { color: #a1271d; }
.inconclusive { border-color: #c98a0c; } .inconclusive b { color: #8c5f05; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; }
.card { background: #fff; border-radius: .4rem; padding: .75rem 1rem; flex: 1 1 11rem; }
.card strong { display: block; font-size: 1.4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; background: #fff; font-size: .92rem; }
th, td { text-align: left; padding: .4rem .7rem; border-bottom: 1px solid #e4e8ed;
  vertical-align: top; }
th { font-weight: 600; color: #47525f; background: #fafbfc; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font-size: .9em; overflow-wrap: anywhere; } td code { white-space: nowrap; }
svg { display: block; max-width: 100%; margin-bottom: .75rem; }
svg text { font: 12px system-ui, sans-serif; fill: #47525f; }
"""
_HEADLINE = {
    Outcome.PASS: "Passed: the compressed model is close enough to the original.",
    Outcome.FAIL: "Failed: the compressed model has lost too much.",
    Outcome.INCONCLUSIVE: "Undecided: the evidence is too small to say.",
}
# Left edge and width of a chart's plane, in pixels.
_LEFT, _WIDTH = 8, 740


def make_page(report: Report, manifest: Mapping[str, Any]) -> str:
    """``manifest`` is the artefact's venturi.json, {} where it has none."""
    found, recipe = report.evaluation, manifest.get("recipe") or {}
    name = str(recipe.get("name") or "artefact")
    parts = [
        f"<h1>What compression cost: {escape(name)}</h1>",
        "<p>Venturi stores a language model's weights with fewer bits, so that it is smaller and "
        "faster. This page says how far the compressed model's answers moved from the original's, "
        "and whether that is within the limits set for it.</p>",
        f'<p class="quiet"><code>{escape(_name(found.artefact.folder))}</code> against its '
        f"original <code>{escape(_name(found.original.folder))}</code></p>",
        _verdict(report),
        "<h2>Gained</h2>",
        _gains(found, manifest),
        "<h2>Lost</h2>",
        _losses(report),
        _restored(report),
        _frontier(report, recipe.get("resolved") or {}),
        "<h2>How it was measured</h2>",
        _method(report),
        make_layers(manifest, report.restored),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}: {report.verdict.outcome.value}</title><style>{_STYLE}</style>"
        f"</head><body><main>\n{body}\n</main></body></html>\n"
    )


def _verdict(report: Report) -> str:
    verdict = report.verdict
    remedy = f"<p>What can be done: {escape(verdict.remedy)}.</p>" if verdict.remedy else ""
    sentence = verdict.sentence[:1].upper() + verdict.sentence[1:]
    return (
        f'<div class="verdict {verdict.outcome.value}"><b>{_HEADLINE[verdict.outcome]}</b>'
        f"<p>{escape(sentence)}.</p>{remedy}</div>"
    )


def _gains(found: Evaluation, manifest: Mapping[str, Any]) -> str:
    before, after = found.original, found.artefact
    totals = manifest.get("totals") or {}
    cards = [
        (
            f"x {after.weight_bytes / before.weight_bytes:.2f}",
            f"weights in memory: {_megabytes(before.weight_bytes)} became "
            f"{_megabytes(after.weight_bytes)}",
        ),
        (
            f"x {after.tokens_per_second / before.tokens_per_second:.2f}",
            f"speed of reading text: {before.tokens_per_second:,.0f} became "
            f"{after.tokens_per_second:,.0f} tokens a second",
        ),
    ]
    if "effective_bits_per_weight" in totals:
        bits = f"{totals['effective_bits_per_weight']:.2f} bits"
        cards.append((bits, "for each compressed weight, with its scales"))
    if totals.get("sparsity"):
        cards.append((f"{100 * totals['sparsity']:.0f} %", "of the compressed weights are zero"))
    inner = "".join(
        f'<div class="card"><strong>{escape(big)}</strong>{escape(small)}</div>'
        for big, small in cards
    )
    return f'<div class="cards">{inner}</div>{_speeds(found)}'


def _speeds(found: Evaluation) -> str:
    if not found.speed:
        how = "venturi evaluate --speed"
        return f'<p class="quiet">Generating was not timed; <code>{how}</code> does.</p>'
    cells = [
        f"<td>{one.batch}</td><td class=n>{one.original:,.0f}</td>"
        f"<td class=n>{one.artefact:,.0f}</td><td class=n>x {one.ratio:.2f}</td>"
        f"<td class=n>{_megabytes(one.original_bytes)}</td>"
        f"<td class=n>{_megabytes(one.artefact_bytes)}</td>"
        f"<td class=n>x {one.artefact_bytes / one.original_bytes:.2f}</td>"
        for one in found.speed
    ]
    head = (
        "<th>sequences at a time</th><th class=n>tokens a second, original</th>"
        "<th class=n>compressed</th><th class=n>ratio</th><th class=n>memory, original</th>"
        "<th class=n>compressed</th><th class=n>ratio</th>"
    )
    note = (
        "Generating on this machine, both models in turn; how much is gained depends on how many "
        "sequences share a step. Memory is that of the weights and of what the model remembers of "
        "the sequences (keys and values)."
    )
    return f'<p class="quiet">{note}</p>{make_table(head, cells)}'


def _losses(report: Report) -> str:
    found, quality = report.evaluation, report.evaluation.quality
    if quality is None:
        return (
            f"<p>On {found.broken} of {found.documents} documents the compressed model gave "
            "something that is no number.</p>"
        )
    charts = "".join(_chart(check) for check in report.verdict.checks)
    rows = [
        (
            "KL divergence, nats per token",
            "how far its predictions lie from the original's; 0 is none",
            _interval(quality.kl, 5),
        ),
        (
            "perplexity",
            f"{quality.original_perplexity:.3f} became {quality.artefact_perplexity:.3f}; lower "
            "is better",
            "x " + _interval(quality.perplexity_ratio, 4),
        ),
        (
            "changed first choices, %",
            "how often the most likely next token is another one",
            _interval(quality.flips, 2, 100),
        ),
        *(_task_row(task) for task in found.tasks),
    ]
    cells = [
        f"<td>{escape(a)}</td><td>{escape(b)}</td><td class=n>{escape(c)}</td>" for a, b, c in rows
    ]
    head = "<th>figure</th><th>what it is</th><th class=n>found (95 % interval)</th>"
    return charts + make_table(head, cells)


def _task_row(task: TaskResult) -> tuple[str, str, str]:
    what = f"questions answered right of {task.items}; {task.lost} lost, {task.gained} gained"
    before, after = 100 * task.original_accuracy, 100 * task.artefact_accuracy
    return task.name, what, f"{before:.1f} % became {after:.1f} %"


def _chart(check: Check) -> str:
    """The interval and the limit on one axis, as a picture of the verdict."""
    factor = 1 if check.kind == "kl" else 100
    ends = [0.0, check.limit, check.low, check.high]
    low, high = min(ends), max(ends)
    span = (high - low) * 1.12 or 1.0

    def x(value: float) -> float:
        return _LEFT + _WIDTH * (value - low) / span

    colours = {Outcome.PASS: "#1d8a4e", Outcome.FAIL: "#c2362b", Outcome.INCONCLUSIVE: "#c98a0c"}
    colour = "#7a8594" if check.outcome is None else colours[check.outcome]
    label = "KL divergence" if check.kind == "kl" else f"accuracy lost on {check.name}, %"
    limit, zero = x(check.limit), x(0.0)
    width = max(3.0, x(check.high) - x(check.low))
    # Where the two labels would touch, the zero's is left out.
    zero_label = f'<text x="{zero:.0f}" y="70" text-anchor="middle">0</text>'
    end = _LEFT + _WIDTH
    note = f'<p class="quiet">{escape(check.name)}: {escape(check.note)}.</p>' if check.note else ""
    return (
        f'<svg viewBox="0 0 760 74" width="760" height="74" role="img" '
        f'aria-label="{escape(label)}: interval and limit">'
        f'<text x="{_LEFT}" y="14">{escape(label)}: the bar is the 95 % interval, the line is '
        f"the limit</text>"
        f'<line x1="{_LEFT}" x2="{end}" y1="50" y2="50" stroke="#c5ccd5"/>'
        f'<line x1="{zero:.1f}" x2="{zero:.1f}" y1="44" y2="54" stroke="#8a95a3"/>'
        f"{zero_label if abs(zero - limit) > 40 else ''}"
        f'<rect x="{x(check.low):.1f}" y="38" width="{width:.1f}" height="10" rx="3" '
        f'fill="{colour}"/>'
        f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="24" y2="56" stroke="#1c2430" '
        f'stroke-width="2"/>'
        f'<text x="{limit:.0f}" y="70" text-anchor="middle">limit {factor * check.limit:g}</text>'
        f"</svg>{note}"
    )


def _restored(report: Report) -> str:
    if not report.restored:
        return ""
    cells = [
        f"<td>{escape(one.name)}</td><td>{escape(one.before)}</td><td>{escape(one.after)}</td>"
        f"<td class=n>{_cost(one.contribution)}</td>"
        for one in report.restored
    ]
    head = "<th>decoder layer</th><th>was</th><th>is</th><th class=n>cost, nats per token</th>"
    share = f"{100 * report.kept_share:.0f} % of the targeted weights keep the scheme asked for."
    why = "These layers cost most and got precision back, so that the whole may pass."
    return f"<h2>Restored</h2><p>{why} {share}</p>{make_table(head, cells)}"


def _frontier(report: Report, resolved: Mapping[str, Any]) -> str:
    """What the automatic recipe chose from; nothing for other recipes."""
    if resolved.get("frontier") is None:
        return ""
    try:
        found = msgspec.convert(resolved["frontier"], Frontier)
    except msgspec.ValidationError as error:
        raise CompressError(
            f"venturi.json has a broken frontier: {error}: compress again"
        ) from error
    cells = [
        f"<td>{'<b>chosen</b>' if one.chosen else escape(one.name)}</td>"
        f"<td class=n>{one.bits:.3f}</td><td class=n>{_megabytes(one.nbytes)}</td>"
        f"<td class=n>{one.predicted_kl:.6f}</td><td class=n>{one.kl:.6f}</td>"
        for one in found.points
    ]
    head = (
        "<th>mixture</th><th class=n>bits a weight</th><th class=n>weights</th>"
        "<th class=n>KL predicted</th><th class=n>KL measured</th>"
    )
    mix = ", ".join(f"{100 * share:.0f} % {scheme}" for scheme, share in found.chosen.schemes)
    text = (
        f"Of the weights, {escape(mix)}. {found.measured} mixtures were compared on "
        f"{found.tokens:,} tokens beside those of calibration. The search was ended by: "
        f"{escape(found.stopped)}."
    )
    picture = plot(found, report.gate.max_kl)
    return f"<h2>Chosen from</h2><p>{text}</p>{picture}{make_table(head, cells)}"


def _cost(contribution: float | None) -> str:
    return "no numbers" if contribution is None else f"{contribution:.5f}"


def _method(report: Report) -> str:
    found = report.evaluation
    source = (
        "text that the original wrote itself, which shares no run of 13 tokens with the "
        "calibration text"
        if found.data == (GENERATED,)
        else ", ".join(map(_name, found.data))
    )
    tokens = "" if found.quality is None else f", {found.quality.tokens:,} predictions"
    effects = [
        f"{check.name}: {check.minimum_detectable_effect:.2g} {check.unit}"
        for check in report.verdict.checks
    ]
    rows = [
        ("text", f"{source}: {found.documents} documents of up to {found.window} tokens{tokens}"),
        (
            "original",
            f"{found.original.weights} weights, {found.original.kv_dtype} KV cache"
            + ("" if report.original_known else f"; {UNKNOWN_ORIGINAL}"),
        ),
        (
            "compressed",
            f"{found.artefact.weights} weights, {found.artefact.head} head, "
            f"{found.artefact.kv_dtype} KV cache; kernels {', '.join(found.artefact.kernels)}",
        ),
        (
            "rule",
            "passes if the upper end of the 95 % interval is within the limit; fails if the lower "
            "end is above it; undecided otherwise. Intervals are bootstraps over documents, or "
            "score intervals of paired answers",
        ),
        ("smallest distance from a limit found with 80 % power", "; ".join(effects)),
        ("engine", ", ".join(f"{k} {v[:12]}" for k, v in report.engine.items())),
        ("text's SHA-256", found.data_sha256),
    ]
    cells = [f"<td>{escape(a)}</td><td>{escape(b)}</td>" for a, b in rows if b]
    return make_table("", cells)


def _interval(one: Interval, digits: int, factor: float = 1) -> str:
    value, low, high = (factor * x for x in (one.value, one.low, one.high))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _name(path: str) -> str:
    """A page is passed on: where files lay says nothing to its readers."""
    return Path(path).name


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
