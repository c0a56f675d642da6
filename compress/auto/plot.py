"""The frontier as an SVG picture: bits across, KL up on a logarithmic scale."""

import math
from collections.abc import Sequence
from html import escape

from compress.auto.config import Frontier, Point

_LEFT, _TOP, _WIDTH, _HEIGHT = 70, 34, 470, 280
_STYLE = "font: 12px system-ui, sans-serif; fill: #47525f; background: #fff"
# What is no more than rounding of sums.
_LEAST = 1e-7


def plot(frontier: Frontier, limit: float | None = None) -> str:
    """An SVG element; ``limit`` is the gate's, of the KL. Points that lost nothing are left out."""
    points = [point for point in frontier.points if point.kl > _LEAST]
    if not points:
        return _element("")
    curve = [one for one in frontier.curve if one[1] > _LEAST and one[0] <= points[-1].bits]
    axes = _Axes(points, [point.kl for point in points] + [kl for _, kl in curve])
    line = " ".join(f"{axes.x(bits):.1f},{axes.y(kl):.1f}" for bits, kl in curve)
    uniform = [point for point in points if point.uniform]
    parts = [
        axes.drawn(),
        f'<polyline points="{line}" fill="none" stroke="#9db7e8" stroke-width="1.5"/>',
        *(_mark(point, axes, uniform) for point in points),
        _legend(uniform),
    ]
    if limit is not None and 10**axes.bottom <= limit <= 10**axes.top:
        y, end = axes.y(limit), _LEFT + _WIDTH
        parts.append(
            f'<line x1="{_LEFT}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}" stroke="#c98a0c" '
            f'stroke-dasharray="4 4"/><text x="{end - 4}" y="{y - 4:.1f}" text-anchor="end">'
            f"gate's limit {limit:g}</text>"
        )
    return _element("".join(parts))


class _Axes:
    """Pixels of bits, and of KL between two powers of ten."""

    def __init__(self, points: Sequence[Point], values: Sequence[float]) -> None:
        self._low = points[0].bits
        self._span = max(0.1, points[-1].bits - self._low)
        self.bottom = math.floor(math.log10(min(values)))
        self.top = max(self.bottom + 1, math.ceil(math.log10(max(values))))

    def x(self, bits: float) -> float:
        return _LEFT + 14 + (_WIDTH - 28) * (bits - self._low) / self._span

    def y(self, kl: float) -> float:
        share = (math.log10(max(kl, 10**self.bottom)) - self.bottom) / (self.top - self.bottom)
        return _TOP + _HEIGHT * (1 - share)

    def drawn(self) -> str:
        """Title, lines at powers of ten, and bits below."""
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
        step = 0.5 if self._span < 3 else 1 if self._span < 8 else 2
        first = math.ceil(self._low / step)
        for count in range(first, math.floor((self._low + self._span) / step) + 1):
            x = self.x(count * step)
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}" '
                f'stroke="#8a95a3"/><text x="{x:.1f}" y="{bottom + 20}" '
                f'text-anchor="middle">{count * step:g}</text>'
            )
        return "".join(parts)


def _mark(point: Point, axes: _Axes, uniform: Sequence[Point]) -> str:
    x, y = axes.x(point.bits), axes.y(point.kl)
    title = f"<title>{escape(point.name)}: {point.bits:.3f} bits, KL {point.kl:g}</title>"
    if point.chosen:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="#1d8a4e">{title}</circle>'
    if not point.uniform:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#2f5fb3">{title}</circle>'
    number = uniform.index(point) + 1
    return (
        f'<rect x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7" fill="#c2362b">{title}'
        f'</rect><text x="{x:.1f}" y="{y - 8:.1f}" text-anchor="middle">{number}</text>'
    )


def _legend(uniform: Sequence[Point]) -> str:
    x, y = _LEFT + _WIDTH + 24, _TOP + 12
    marks = [
        f'<circle cx="{x}" cy="{y - 4}" r="6" fill="#1d8a4e"/><text x="{x + 14}" y="{y}">chosen'
        "</text>",
        f'<circle cx="{x}" cy="{y + 16}" r="3.5" fill="#2f5fb3"/><text x="{x + 14}" '
        f'y="{y + 20}">other mixtures</text>',
    ]
    for number, point in enumerate(uniform, start=1):
        line = y + 20 + 20 * number
        marks.append(
            f'<rect x="{x - 3.5}" y="{line - 8}" width="7" height="7" fill="#c2362b"/>'
            f'<text x="{x + 14}" y="{line}">{number} {escape(point.name)}</text>'
        )
    return "".join(marks)


def _element(body: str) -> str:
    width, height = _LEFT + _WIDTH + 250, _TOP + _HEIGHT + 30
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" style="{_STYLE}" '
        f'aria-label="size and quality of mixtures">{body}</svg>\n'
    )
