"""The page's table of layers: what became of each, and why."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from compress.gate.report import Restored


def make_table(head: str, cells: Iterable[str]) -> str:
    """``head`` "" leaves the header out."""
    rows = "\n".join(f"<tr>{one}</tr>" for one in cells)
    return f'<div class="wide"><table>{f"<tr>{head}</tr>" if head else ""}{rows}</table></div>'


def make_layers(manifest: Mapping[str, Any], restored: Sequence[Restored]) -> str:
    """From the rows of venturi.json; "" where it has none."""
    layers = manifest.get("layers") or []
    if not layers:
        return ""
    back = {one.name: one for one in restored}
    cells = [
        f"<td><code>{escape(str(one.get('name')))}</code></td>"
        f"<td>{escape(str(one.get('storage')))}</td><td>{escape(str(one.get('execution')))}</td>"
        f"<td class=n>{one.get('bits', 0):.2f}</td><td class=n>{_error(one)}</td>"
        f"<td>{escape(_why(one, back))}</td>"
        for one in sorted(layers, key=_order)
    ]
    head = (
        "<th>layer</th><th>stored as</th><th>multiplied as</th><th class=n>bits a weight</th>"
        "<th class=n>error</th><th>why</th>"
    )
    note = (
        "Error: of the layer's output on calibration text, relative to simple rounding or "
        "pruning where that was measured (below 1 is better), else of its weights, in percent."
    )
    return f'<h2>Layer by layer</h2><p class="quiet">{note}</p>{make_table(head, cells)}'


def _decoder_layer(row: Mapping[str, Any]) -> int | None:
    found = re.search(r"\.(\d+)\.", str(row.get("name")))
    return int(found[1]) if found else None


def _order(row: Mapping[str, Any]) -> tuple[float, str]:
    """As the model computes them, the head last."""
    index = _decoder_layer(row)
    return (math.inf if index is None else index), str(row.get("name"))


def _why(row: Mapping[str, Any], restored: Mapping[str, Restored]) -> str:
    one = restored.get(f"layer {_decoder_layer(row)}")
    if one is not None and one.contribution is None:
        return f"restored: {one.name} gave no numbers"
    if one is not None:
        return f"restored: {one.name} alone cost {one.contribution:.4f} nats"
    if row.get("note"):
        return str(row["note"])
    method, kept = row.get("method"), row.get("kept")
    better = f", where {kept} lost less" if kept and kept != method else ""
    return f"by the recipe: {method}{better}"


def _error(row: Mapping[str, Any]) -> str:
    output, baseline, weight = (
        row.get(key) for key in ("output_error", "baseline_error", "relative_error")
    )
    if output is not None and baseline:
        return f"x {output / baseline:.2f}"
    return "" if weight is None else f"{100 * weight:.2f} %"
