"""Charts as SVG: drawn to be read on a phone and in the dark, every mark with what it stands for on hover.

Colours come from the page's CSS (page.py): classes ``best``, ``base``, ``front``, ``plain`` and ``s0`` to ``s7``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 520, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 14, 46
ROW = 34
"""Height of a row of bars or of dots."""
MAX_POINTS = 200
"""Of a curve."""


class Point(NamedTuple):
    """A mark of a scatter plot or of a line."""

    x: float
    y: float
    words: str
    """Shown on hover."""
    kind: str = "plain"


class Bar(NamedTuple):
    """A horizontal bar with its interval."""

    name: str
    value: float
    low: float
    high: float
    words: str
    kind: str = "s0"


class Row(NamedTuple):
    """Values of one thing, as dots in a row."""

    name: str
    values: Sequence[float]
    kind: str = "s0"


class _Axis:
    """Maps values to places."""

    def __init__(
        self, values: Sequence[float], start: float, end: float, *, from_zero: bool = False, counts: bool = False
    ) -> None:
        low, high = min(values), max(values)
        low = 0.0 if from_zero and low >= 0 else low
        if high <= low:
            low, high = (0.0, 1.0) if high == 0 else (low - abs(low) / 10, high + abs(high) / 10)
        margin = 0.06 * (high - low)
        self.low, self.high = low if from_zero and low == 0 else low - margin, high + margin
        self._start, self._end = start, end
        self._least_step = 1.0 if counts else 0.0

    def __call__(self, value: float) -> float:
        return self._start + (value - self.low) / (self.high - self.low) * (self._end - self._start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values, about so many."""
        span = self.high - self.low
        step = 10.0 ** math.floor(math.log10(span / count))
        step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
        step = max(step, self._least_step)
        first = math.ceil(self.low / step)
        return [step * place for place in range(first, math.floor(self.high / step) + 1)]


def scatter(points: Sequence[Point], x_title: str, y_title: str, *, joined: Sequence[Point] = ()) -> str:
    """Marks in two dimensions; ``joined`` are besides joined by a line of steps, as a Pareto front is."""
    x, y = _axes(points)
    parts = _frame(x, y, x_title, y_title)
    if joined:
        places = [f"{x(point.x):.1f},{y(point.y):.1f}" for point in sorted(joined)]
        parts.append(f'<polyline class="joined" points="{" ".join(places)}"/>')
    for point in sorted(points, key=lambda point: point.kind != "plain"):
        parts.append(_mark(x(point.x), y(point.y), point))
    return _svg(parts, HEIGHT, f"{y_title} against {x_title}")


def lines(series: Mapping[str, Sequence[Point]], x_title: str, y_title: str) -> str:
    """A line for each series over the sizes that there are, evenly spaced, with a legend."""
    everything = [point for points in series.values() for point in points]
    sizes = sorted({point.x for point in everything})
    x = _Axis([0, max(1, len(sizes) - 1)], LEFT, WIDTH - RIGHT)
    y = _Axis([point.y for point in everything], HEIGHT - BOTTOM, TOP, from_zero=True)
    parts = _frame(None, y, x_title, y_title)
    for place, size in enumerate(sizes):
        parts.append(_text(x(place), HEIGHT - BOTTOM + 18, f"{size:g}", "tick middle"))
    for number, points in enumerate(series.values()):
        ordered = sorted(points)
        places = [(x(sizes.index(point.x)), y(point.y)) for point in ordered]
        parts.append(
            f'<polyline class="line s{number % 8}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in places)}"/>'
        )
        parts += [
            _mark(a, b, point._replace(kind=f"s{number % 8}")) for (a, b), point in zip(places, ordered, strict=True)
        ]
    return _svg(parts, HEIGHT, f"{y_title} against {x_title}") + _legend(enumerate(series))


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]], x_title: str, y_title: str, *, is_marked: bool = False
) -> str:
    """A curve for each series over a count, with a legend where there are several; what ``is_marked`` says its values
    on hover. What is no number is left out; nothing at all where nothing is left."""
    finite = {name: [point for point in points if math.isfinite(point[1])] for name, points in series.items()}
    drawn = [(number, name, points) for number, (name, points) in enumerate(finite.items()) if points]
    if not drawn:
        return ""
    everything = [point for _, _, points in drawn for point in points]
    x = _Axis([x for x, _ in everything], LEFT, WIDTH - RIGHT, counts=True)
    y = _Axis([y for _, y in everything], HEIGHT - BOTTOM, TOP)
    parts = _frame(x, y, x_title, y_title)
    for number, name, points in drawn:
        kind, places = f"s{number % 8}", [(x(a), y(b)) for a, b in points]
        parts.append(f'<polyline class="line {kind}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in places)}"/>')
        if is_marked:
            words = [f"{name}, {x_title} {a:g}: {b:.4g}" for a, b in points]
            parts += [_mark(a, b, Point(a, b, said, kind)) for (a, b), said in zip(places, words, strict=True)]
    legend = _legend((number, name) for number, name, _ in drawn) if len(series) > 1 else ""
    return _svg(parts, HEIGHT, f"{y_title} against {x_title}") + legend


def averaged(values: Sequence[float]) -> list[tuple[float, float]]:
    """A curve's points by their number, from 1; where they are many, averaged in groups. What is no number is left
    out."""
    size = max(1, math.ceil(len(values) / MAX_POINTS))
    finite = [(place, value) for place, value in enumerate(values, 1) if math.isfinite(value)]
    groups = [finite[start : start + size] for start in range(0, len(finite), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def bars(rows: Sequence[Bar], title: str, *, reference: float = 1.0) -> str:
    """Horizontal bars from the reference, with their intervals."""
    height = TOP + ROW * len(rows) + BOTTOM
    ends = [end for row in rows for end in (row.value, min(row.high, 4 * row.value), max(row.low, row.value / 4))]
    x = _Axis([reference, *ends], 150, WIDTH - 60)
    parts = [_grid(x(tick), TOP, height - BOTTOM, f"{tick:g}") for tick in x.ticks()]
    parts.append(_text((150 + WIDTH) / 2, height - 8, title, "title middle"))
    for place, row in enumerate(rows):
        middle = TOP + ROW * place + ROW / 2
        start, end = sorted((x(reference), x(row.value)))
        low, high = x(max(row.low, x.low)), x(min(row.high, x.high))
        parts.append(_text(144, middle + 4, row.name, "name end"))
        parts.append(
            f'<g class="mark {row.kind}" data-words="{escape(row.words)}"><title>{escape(row.words)}</title>'
            f'<rect x="{start:.1f}" y="{middle - 9:.1f}" width="{max(1.0, end - start):.1f}" height="18" rx="3"/>'
            f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{middle:.1f}" y2="{middle:.1f}"/></g>'
        )
    return _svg(parts, height, title)


def dots(rows: Sequence[Row], title: str, unit: str) -> str:
    """Every value of every row as a dot, the median as a stroke."""
    height = TOP + ROW * len(rows) + BOTTOM
    x = _Axis([value for row in rows for value in row.values], 150, WIDTH - RIGHT, from_zero=True)
    parts = [_grid(x(tick), TOP, height - BOTTOM, f"{tick:g}") for tick in x.ticks()]
    parts.append(_text((150 + WIDTH) / 2, height - 8, title, "title middle"))
    for place, row in enumerate(rows):
        middle = TOP + ROW * place + ROW / 2
        parts.append(_text(144, middle + 4, row.name, "name end"))
        for value in row.values:
            point = Point(value, 0.0, f"{row.name}: {value:,.1f} {unit}", row.kind)
            parts.append(_mark(x(value), middle, point, radius=3.5))
        median = x(sorted(row.values)[len(row.values) // 2])
        ends = f'y1="{middle - 11:.1f}" y2="{middle + 11:.1f}"'
        parts.append(f'<line class="median" x1="{median:.1f}" x2="{median:.1f}" {ends}/>')
    return _svg(parts, height, title)


def _axes(points: Sequence[Point]) -> tuple[_Axis, _Axis]:
    return (
        _Axis([point.x for point in points], LEFT, WIDTH - RIGHT, from_zero=True),
        _Axis([point.y for point in points], HEIGHT - BOTTOM, TOP, from_zero=True),
    )


def _frame(x: _Axis | None, y: _Axis, x_title: str, y_title: str) -> list[str]:
    parts = [_grid(x(tick), TOP, HEIGHT - BOTTOM, f"{tick:g}") for tick in x.ticks()] if x else []
    for tick in y.ticks():
        place = y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(_text(LEFT - 6, place + 4, f"{tick:g}", "tick end"))
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 8, x_title, "title middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f'transform="rotate(-90 14 {middle:.0f})"'
    parts.append(f'<text x="14" y="{middle:.0f}" class="title middle" {turned}>{escape(y_title)}</text>')
    return parts


def _grid(x: float, top: float, bottom: float, words: str) -> str:
    line = f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>'
    return line + _text(x, bottom + 18, words, "tick middle")


def _mark(x: float, y: float, point: Point, radius: float = 5.5) -> str:
    words = escape(point.words)
    circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'
    return f'<g class="mark {escape(point.kind)}" data-words="{words}"><title>{words}</title>{circle}</g>'


def _text(x: float, y: float, words: str, kind: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(words)}</text>'


def _legend(names: Iterable[tuple[int, str]]) -> str:
    items = "".join(f'<span class="item"><i class="s{number % 8}"></i>{escape(name)}</span>' for number, name in names)
    return f'<p class="legend">{items}</p>'


def _svg(parts: Sequence[str], height: float, words: str) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(words)}">{body}</svg>'
