"""Line charts as SVG text, without library, script or request. A scale starts at zero, or says that it does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from prefopt.pages import printable

COLOURS = ("#1f6feb", "#d1570c", "#2b8a3e", "#9c36b5", "#c92a2a", "#0b7285", "#8a6d00", "#5f3dc4")
WIDTH, PLOT_HEIGHT = 520, 220
LETTER = 6.3  # pixels of a character at 11 px, about: a wide one needs more, and a legend leaves room for it
TITLE, LEGEND_LINE, FOOT, RIGHT = 26, 17, 46, 14
FEW_POINTS = 40  # up to so many, each is drawn as a dot
MAX_POINTS = 500


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: what the legend calls it.
        x, y: (N,) its points; points that are not finite are left out.
        low, high: (N,) ends of an interval around each point, drawn as a band.
        raw: (N,) single values behind a smoothed line, drawn faintly.
        colour: place in `COLOURS`.
        dashed: drawn with gaps, to tell two lines of one colour apart.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    raw: Sequence[float] | None = None
    colour: int = 0
    dashed: bool = False

    def points(self, values: Sequence[float] | None) -> list[tuple[float, float]]:
        """Return the finite points of `values` over x, at most about `MAX_POINTS` of them, the last included."""
        found = [(x, y) for x, y in zip(self.x, values or ()) if math.isfinite(x) and math.isfinite(y)]
        stride = math.ceil(len(found) / MAX_POINTS)
        return found if stride <= 1 else [*found[:-1:stride], found[-1]]


@dataclass(frozen=True)
class _Scale:
    """Maps values to pixels, with ticks at round numbers."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    at_most: float | None = None,
    mark: float = math.nan,
) -> str:
    """Draw lines over a common x.

    Args:
        lines: at least one finite point among them.
        title: what is drawn.
        x_label: what x counts.
        y_label: what y is, with its unit.
        at_most: the largest value that y can have (1 for a share): the scale ends there.
        mark: a value of y with a line through it, such as 0.5 for a win rate.

    Returns:
        An `<svg>` element; all text of the arguments is escaped.
    """
    entries, legend_lines = _legend(lines)
    top = TITLE + LEGEND_LINE * legend_lines + 6
    values = [y for line in lines for part in (line.y, line.low, line.high, line.raw) for _, y in line.points(part)]
    low, high = _range([*values, *([mark] if math.isfinite(mark) else [])], at_most)
    ticks = _ticks(low, high)
    left = 26 + LETTER * max(len(_number(tick)) for tick in ticks)
    across = [x for line in lines for x, _ in line.points(line.y)]
    whole = all(float(x).is_integer() for x in across)
    first, last = min(across), max(across)
    first, last = (first - 0.5, last + 0.5) if first == last else (first, last)
    x = _Scale(first, last, left, WIDTH - RIGHT, _ticks(first, last, at_least=1.0 if whole else 0.0))
    y = _Scale(low, high, top + PLOT_HEIGHT, top, ticks)
    height = top + PLOT_HEIGHT + FOOT
    note = "" if low <= 0 <= high else f"; the scale starts at {_number(low)}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'height="{height:.0f}" role="img" aria-label="{_text(title)}" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="11" fill="#333">',
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="#fff"/>',
        f'<text x="{left:.1f}" y="15" font-size="13" font-weight="600">{_text(title)}</text>',
        *entries,
        *_axes(x, y, x_label=x_label, y_label=f"{y_label}{note}"),
    ]
    if math.isfinite(mark):
        parts.append(f'<path d="M{left:.1f} {y(mark):.1f}H{WIDTH - RIGHT}" stroke="#777" stroke-dasharray="2 3"/>')
    parts += [_drawn(line, x, y) for line in lines]
    return "\n".join([*parts, "</svg>"])


def stacked(charts: Sequence[str]) -> str:
    """Return one SVG with several charts, one above another."""
    heights = [float(chart.split('height="', 1)[1].split('"', 1)[0]) for chart in charts]
    starts = [sum(heights[:place]) for place in range(len(charts))]
    placed = [chart.replace("<svg ", f'<svg y="{start:.0f}" ', 1) for chart, start in zip(charts, starts)]
    size = f'width="{WIDTH}" height="{sum(heights):.0f}" viewBox="0 0 {WIDTH} {sum(heights):.0f}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', *placed, "</svg>"])


def _text(text: str) -> str:
    return escape(printable(" ".join(text.split())))


def _legend(lines: Sequence[Line]) -> tuple[list[str], int]:
    """Return the legend's elements, row by row under the title, and how many rows it takes."""
    if len(lines) == 1 and not lines[0].name:
        return [], 0
    parts, at, row = [], 14.0, 0
    for line in lines:
        name = line.name if len(line.name) <= 60 else f"{line.name[:59]}…"
        width = 30 + 1.15 * LETTER * len(name)
        if at > 14.0 and at + width > WIDTH - RIGHT:
            at, row = 14.0, row + 1
        y = TITLE + LEGEND_LINE * row + 4
        parts.append(f'<path d="M{at:.1f} {y}h16" {_stroke(line)}/>')
        parts.append(f'<text x="{at + 21:.1f}" y="{y + 4}">{_text(name)}</text>')
        at += width
    return parts, row + 1


def _axes(x: _Scale, y: _Scale, *, x_label: str, y_label: str) -> list[str]:
    bottom, left = y.start, x.start
    parts = []
    for tick in y.ticks:
        at = y(tick)
        parts.append(f'<path d="M{left:.1f} {at:.1f}H{x.end:.1f}" stroke="{"#999" if tick == 0 else "#e4e4e4"}"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{at + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in x.ticks:
        anchor = "end" if x(tick) > x.end - 12 else "middle"
        parts.append(f'<path d="M{x(tick):.1f} {bottom:.1f}v4" stroke="#999"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 19:.1f}" text-anchor="{anchor}">{_number(tick)}</text>')
    middle = (bottom + y.end) / 2
    return [
        *parts,
        f'<text x="{(left + x.end) / 2:.1f}" y="{bottom + 37:.1f}" text-anchor="middle">{_text(x_label)}</text>',
        f'<text transform="translate(12 {middle:.1f}) rotate(-90)" text-anchor="middle">{_text(y_label)}</text>',
    ]


def _drawn(line: Line, x: _Scale, y: _Scale) -> str:
    """Draw a line: its band, what lies behind it, itself."""
    parts = []
    colour = COLOURS[line.colour % len(COLOURS)]
    lower, upper = line.points(line.low), line.points(line.high)
    if len(lower) > 1:
        outline = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in [*upper, *reversed(lower)])
        parts.append(f'<polygon points="{outline}" fill="{colour}" fill-opacity="0.16"/>')
    elif lower and upper:
        parts.append(f'<path d="M{x(lower[0][0]):.1f} {y(lower[0][1]):.1f}V{y(upper[0][1]):.1f}" stroke="{colour}"/>')
    dots = line.points(line.raw)
    if len(dots) > 1:
        parts.append(f'<path d="{_path(dots, x, y)}" fill="none" stroke="{colour}" stroke-opacity="0.3"/>')
    points = line.points(line.y)
    if len(points) > 1:
        parts.append(f'<path class="line" d="{_path(points, x, y)}" fill="none" {_stroke(line)}/>')
    if len(points) <= FEW_POINTS:
        parts += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.6" fill="{colour}"/>' for a, b in points]
    return "".join(parts)


def _stroke(line: Line) -> str:
    dashes = ' stroke-dasharray="5 3"' if line.dashed else ""
    return f'stroke="{COLOURS[line.colour % len(COLOURS)]}" stroke-width="1.8"{dashes}'


def _path(points: Sequence[tuple[float, float]], x: _Scale, y: _Scale) -> str:
    return "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)


def _range(values: Sequence[float], at_most: float | None) -> tuple[float, float]:
    """Return the ends of a scale: from zero, unless all values are below it."""
    low, high = min(values), max(values)
    if low >= 0:
        if at_most is not None:
            return 0.0, max(at_most, high)
        return 0.0, _ticks(0.0, high * 1.02 or 1.0, beyond=True)[-1]
    if high <= 0 and low < 1.5 * high:  # zero is near
        return _ticks(low * 1.02, 0.0, beyond=True)[0], 0.0
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    ticks = _ticks(low - room, high + room, beyond=True)
    return ticks[0], ticks[-1]


def _ticks(low: float, high: float, *, at_least: float = 0.0, beyond: bool = False) -> list[float]:
    """Return round numbers between two ends, about six; with `beyond`, those that enclose the ends as well."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = max(at_least, next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if beyond:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [count * step for count in range(first, last + 1)]
    assert all(a < b for a, b in pairwise(ticks))
    return ticks or [low]


def _number(value: float) -> str:
    value = 0.0 if abs(value) < 1e-12 else value
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.4g}{unit}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")
