"""Tokens/s against the batch, with the ceilings of memory and of arithmetic, as SVG."""

import math
from collections.abc import Iterator

from bench.cpu_models import SHAPES, matrix_weights
from bench.cpu_results import Results

_BATCHES = (1, 8, 32)
_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 500, 30, 370
_COLOURS = ("#d62728", "#ff7f0e", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#17becf", "#7f7f7f")
_DASHES = ("8 4", "2 3")

Point = tuple[float, float]


class _Axes:
    """Both logarithmic: batches, and tokens/s up to ``top``."""

    def __init__(self, bottom: float, top: float) -> None:
        self.low, self.high = math.floor(math.log10(bottom)), math.log10(top) + 0.1

    def at(self, batch: float, tps: float) -> Point:
        """Where a figure is drawn."""
        right = math.log2(batch) / math.log2(_BATCHES[-1])
        up = (math.log10(tps) - self.low) / (self.high - self.low)
        return _LEFT + (_RIGHT - _LEFT) * right, _BOTTOM - (_BOTTOM - _TOP) * up


def plot(results: Results, model: str) -> str:
    """The SVG's text."""
    engines = results.models[model]
    series: dict[str, list[tuple[float, float]]] = {
        name: [(b, m.value(f"decode{b}_tps")) for b in _BATCHES if f"decode{b}_tps" in m.figures]
        for name, m in engines.items()
    }
    ceilings = _ceilings(results, model)
    every = [tps for points in [*series.values(), *ceilings.values()] for _, tps in points]
    axes = _Axes(min(every), max(every))
    parts = [*_frame(axes, f"Model {model}: decode, tokens/s")]
    for row, (name, points) in enumerate(series.items()):
        parts += _line(axes, row, name, points, _COLOURS[row % len(_COLOURS)], "")
    for row, (name, points) in enumerate(ceilings.items(), start=len(series)):
        dashes = f' stroke-dasharray="{_DASHES[row - len(series)]}"'
        parts += _line(axes, row, name, points, "#000000", dashes)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="sans-serif" font-size="12">\n'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _ceilings(results: Results, model: str) -> dict[str, list[Point]]:
    """Of INT8 weights: all are read once a step; two operations for each, row and step."""
    ours = next((m for m in results.models[model].values() if "dram_gb_s" in m.figures), None)
    if ours is None:
        return {}
    weights = matrix_weights(SHAPES[model])
    steps = ours.value("dram_gb_s") * 1e9 / weights
    compute = ours.value("int8_gop_s") * 1e9 / (2 * weights)
    return {
        "ceiling: DRAM, INT8 weights": [(b, b * steps) for b in _BATCHES],
        "ceiling: INT8 arithmetic": [(b, compute) for b in _BATCHES],
    }


def _frame(axes: _Axes, title: str) -> Iterator[str]:
    yield f'<text x="{_LEFT}" y="18" font-size="14">{title}</text>'
    for batch in _BATCHES:
        x, _ = axes.at(batch, 1)
        yield f'<line x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{_BOTTOM}" stroke="#dddddd"/>'
        yield f'<text x="{x:.1f}" y="{_BOTTOM + 16}" text-anchor="middle">{batch}</text>'
    for power in range(axes.low, math.floor(axes.high) + 1):
        for tps in (10.0**power, 2 * 10.0**power, 5 * 10.0**power):
            _, y = axes.at(1, tps)
            if y >= _TOP:
                yield f'<path d="M {_LEFT} {y:.1f} H {_RIGHT}" stroke="#dddddd"/>'
                yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tps:g}</text>'
    middle = (_LEFT + _RIGHT) / 2
    yield f'<text x="{middle}" y="{_BOTTOM + 34}" text-anchor="middle">sequences</text>'


def _line(
    axes: _Axes, row: int, name: str, points: list[Point], colour: str, dashes: str
) -> Iterator[str]:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (axes.at(*point) for point in points))
    yield f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'
    if not dashes:
        for x, y in (axes.at(*point) for point in points):
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
    y = _TOP + 10 + 20 * row
    left = _RIGHT + 15
    yield f'<path d="M {left} {y} h 24" stroke="{colour}" stroke-width="2"{dashes}/>'
    yield f'<text x="{left + 30}" y="{y + 4}">{name}</text>'
