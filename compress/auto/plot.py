"""The frontier as an SVG picture: bits across, KL up on a logarithmic scale."""

import math
from html import escape

from compress.auto.config import Auto, Frontier, Point

_LEFT, _TOP, _WIDTH, _HEIGHT = 76, 36, 640, 300
_STYLE = "font: 12px system-ui, sans-serif; fill: #47525f"
_LEAST = 1e-7


def plot(frontier: Frontier, auto: Auto | None = None) -> str:
    """A whole SVG document; points without a KL, or with none lost, are left out."""
    points = [point for point in frontier.points if point.kl is not None and point.kl > _LEAST]
    if not points:
        return _document("")
    values = [one for point in points for one in (point.kl or 0.0, point.predicted_kl)]
    axes = _Axes(
        low=min(point.bits for point in points),
        high=max(point.bits for point in points),
        bottom=math.floor(math.log10(max(_LEAST, min(values)))),
        top=math.ceil(math.log10(max(values))),
    )
    path = [point for point in points if point.name == "auto"]
    line = " ".join(f"{axes.x(one.bits):.1f},{axes.y(one.predicted_kl):.1f}" for one in path)
    parts = [
        axes.drawn(),
        f'<polyline points="{line}" fill="none" stroke="#9db7e8" stroke-width="1.5"/>',
        *(_mark(point, axes) for point in points),
    ]
    if auto is not None and auto.budget == "bits" and axes.low <= auto.limit <= axes.high:
        x = axes.x(auto.limit)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_TOP + _HEIGHT}" '
            'stroke="#c98a0c" stroke-dasharray="4 4"/>'
        )
    return _document("".join(parts))


class _Axes:
    """Pixels of bits, and of KL between two powers of ten."""

    def __init__(self, low: float, high: float, bottom: int, top: int) -> None:
        self.low, self.high = low, max(high, low + 0.1)
        self.bottom, self.top = bottom, max(top, bottom + 1)

    def x(self, bits: float) -> float:
        return _LEFT + 12 + (_WIDTH - 24) * (bits - self.low) / (self.high - self.low)

    def y(self, kl: float) -> float:
        share = (math.log10(max(kl, 10**self.bottom)) - self.bottom) / (self.top - self.bottom)
        return _TOP + _HEIGHT * (1 - share)

    def drawn(self) -> str:
        bottom = _TOP + _HEIGHT
        parts = [
            f'<text x="{_LEFT}" y="16">KL of the final logits, nats per token, by stored bits a '
            "weight; the line is predicted, marks are measured</text>"
        ]
        for power in range(self.bottom, self.top + 1):
            y = self.y(10.0**power)
            parts.append(
                f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" '
                f'stroke="#e4e8ed"/><text x="{_LEFT - 8}" y="{y + 4:.1f}" '
                f'text-anchor="end">{10.0**power:g}</text>'
            )
        for bits in range(math.ceil(self.low), math.floor(self.high) + 1):
            x = self.x(bits)
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}" '
                f'stroke="#8a95a3"/><text x="{x:.1f}" y="{bottom + 20}" '
                f'text-anchor="middle">{bits}</text>'
            )
        return "".join(parts)


def _mark(point: Point, axes: _Axes) -> str:
    x, y = axes.x(point.bits), axes.y(point.kl or 0.0)
    title = f"<title>{escape(point.name)}: {point.bits:.3f} bits, KL {point.kl:g}</title>"
    if point.chosen:
        label = f'<text x="{x + 10:.1f}" y="{y - 6:.1f}" font-weight="600">chosen</text>'
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="#1d8a4e">{title}</circle>{label}'
    if point.name == "auto":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#2f5fb3">{title}</circle>'
    return (
        f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="#c2362b">{title}'
        f'</rect><text x="{x + 9:.1f}" y="{y - 5:.1f}" fill="#c2362b">{escape(point.name)}</text>'
    )


def _document(body: str) -> str:
    width, height = _LEFT + _WIDTH + 150, _TOP + _HEIGHT + 36
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" style="{_STYLE}; background: #fff" '
        f'aria-label="cost and quality of mixtures">{body}</svg>\n'
    )
