"""Line charts as SVG: enough for curves of delay, and nothing to install."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 170, 44, 52
_COLOURS = ("#0b6e4f", "#c1121f", "#e09f3e", "#5f0f40", "#277da1", "#6c757d", "#9c6644", "#8338ec", "#000000")
_DASHES = ("", "6 3", "2 3", "8 3 2 3")


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: points in order of x."""

    name: str
    points: Sequence[tuple[float, float]]
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    title: str
    x: str
    y: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False


class _Axis:
    """From values to pixels. A logarithmic axis begins at the smallest positive value; what lies below sits on it."""

    def __init__(self, values: Sequence[float], first: float, last: float, log: bool) -> None:
        self._log, self._first, self._last = log, first, last
        positive = [v for v in values if v > 0] or [1.0]
        if log:
            self._low, self._high = float(floor(log10(min(positive)))), float(ceil(log10(max(positive))))
        else:
            self._low, self._high = 0.0, max(positive)
        if self._high <= self._low:
            self._high = self._low + 1.0

    def at(self, value: float) -> float:
        place = (log10(max(value, 10**self._low)) if self._log else value) - self._low
        return self._first + place / (self._high - self._low) * (self._last - self._first)

    def ticks(self) -> list[float]:
        if self._log:
            return [10.0**e for e in range(int(self._low), int(self._high) + 1)]
        step = 10.0 ** floor(log10(self._high / 4))
        step *= next(m for m in (1, 2, 5, 10) if self._high / (step * m) <= 6)
        return [i * step for i in range(int(self._high / step + 1e-9) + 1)]


def svg(chart: Chart) -> str:
    """The chart as an SVG document."""
    points = [p for line in chart.lines for p in line.points]
    x = _Axis([p[0] for p in points], _LEFT, _WIDTH - _RIGHT, chart.log_x)
    y = _Axis([p[1] for p in points], _HEIGHT - _BOTTOM, _TOP, chart.log_y)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        _text(_LEFT, 24, chart.title, size=15),
        _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, chart.x, anchor="middle"),
        f'<g transform="rotate(-90 18 {(_HEIGHT - _BOTTOM + _TOP) / 2})">'
        + _text(18, (_HEIGHT - _BOTTOM + _TOP) / 2, chart.y, anchor="middle")
        + "</g>",
    ]
    for tick in x.ticks():
        parts.append(_rule(x.at(tick), _TOP, x.at(tick), _HEIGHT - _BOTTOM))
        parts.append(_text(x.at(tick), _HEIGHT - _BOTTOM + 18, _number(tick), anchor="middle"))
    for tick in y.ticks():
        parts.append(_rule(_LEFT, y.at(tick), _WIDTH - _RIGHT, y.at(tick)))
        parts.append(_text(_LEFT - 8, y.at(tick) + 4, _number(tick), anchor="end"))
    for i, line in enumerate(chart.lines):
        parts += _curve(i, line, x, y)
    return "\n".join([*parts, "</svg>", ""])


def _curve(i: int, line: Line, x: _Axis, y: _Axis) -> list[str]:
    colour, dash = _COLOURS[i % len(_COLOURS)], _DASHES[(i // len(_COLOURS)) % len(_DASHES)]
    width = 3 if line.strong else 1.6
    style = f'stroke="{colour}" stroke-width="{width}"' + (f' stroke-dasharray="{dash}"' if dash else "")
    path = " ".join(f"{x.at(px):.1f},{y.at(py):.1f}" for px, py in line.points)
    row = _TOP + 10 + 20 * i
    right = _WIDTH - _RIGHT + 12
    return [
        f'<polyline fill="none" {style} points="{path}"/>',
        f'<line x1="{right}" y1="{row}" x2="{right + 22}" y2="{row}" {style}/>',
        _text(right + 28, row + 4, line.name),
    ]


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _number(value: float) -> str:
    return f"{value:g}"
