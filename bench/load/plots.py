"""Plots as SVG, to stand in a page: no script, no font, nothing from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 560, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 28, 12, 44
_LEGEND_ROW, _LEGEND_COLUMN = 16, 130
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#ee8866")
_PART_COLOURS = (
    "#8da0cb", "#66c2a5", "#e78ac3", "#fc8d62", "#4477aa", "#228833", "#b3261e", "#aa7733", "#777f8f", "#ccbb44",
)  # fmt: skip
"""Colours of the parts of a request's time, in their order; the playground has the same."""

_ON_CURVES = ' class="on-curves"'
_MOST_POINTS = 400


@dataclass(frozen=True, slots=True)
class Series:
    """Points (x, y) joined by a line."""

    label: str
    points: Sequence[tuple[float, float]]
    markers: bool = False
    names: Sequence[str] = ()
    """Written beside the points."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale from `low` to `high`, logarithmic or not."""

    label: str
    low: float
    high: float
    is_log: bool = False

    @classmethod
    def around(cls, label: str, values: Sequence[float], *, is_log: bool = False) -> Axis:
        """Holds all values: from zero, or between powers of ten (values of zero and below are left out there)."""
        if not is_log:
            return cls(label, 0.0, 1.05 * max(values, default=0.0) or 1.0)
        positive = [value for value in values if value > 0] or [1.0]
        low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
        return cls(label, 10.0**low, 10.0 ** max(high, low + 1), True)

    def place(self, value: float) -> float:
        """Return the position of a value, from 0 to 1."""
        if not self.is_log:
            return (value - self.low) / (self.high - self.low)
        clipped = max(value, self.low)
        return math.log10(clipped / self.low) / math.log10(self.high / self.low)

    def ticks(self) -> list[float]:
        """Round values on it."""
        if self.is_log:
            decades = round(math.log10(self.high / self.low))
            between = (1, 2, 5) if decades <= 2 else (1,)
            ticks = [self.low * 10.0**decade * factor for decade in range(decades) for factor in between]
            return [*ticks, self.high]
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 2))
        step = next(step * factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= 6)
        return [self.low + step * number for number in range(int((self.high - self.low) / step + 1e-9) + 1)]


def line_plot(title: str, series: Sequence[Series], x: Axis, y: Axis) -> str:
    """Lines over two axes, with a legend above them, where no line goes."""
    per_row = (WIDTH - _LEFT - _RIGHT) // _LEGEND_COLUMN
    plot_top = _TOP + _LEGEND_ROW * -(-len(series) // per_row) + 4
    inner_width, inner_height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
    height = plot_top + inner_height + _BOTTOM

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return _LEFT + x.place(point[0]) * inner_width, plot_top + (1 - y.place(point[1])) * inner_height

    parts: list[str] = []
    for tick in x.ticks():
        place = at((tick, y.low))[0]
        parts.append(_line(place, plot_top, place, plot_top + inner_height, "grid"))
        parts.append(_text(place, height - _BOTTOM + 16, _number(tick), "middle"))
    for tick in y.ticks():
        place = at((x.low, tick))[1]
        parts.append(_line(_LEFT, place, WIDTH - _RIGHT, place, "grid"))
        parts.append(_text(_LEFT - 6, place + 4, _number(tick), "end"))
    parts.append(_text(_LEFT + inner_width / 2, height - 8, x.label, "middle"))
    centre = plot_top + inner_height / 2
    parts.append(_text(14, centre, y.label, "middle", f' transform="rotate(-90 14 {centre:.1f})"'))
    for number, one in enumerate(series):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [at(point) for point in one.points]
        joined = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        if one.markers:
            parts += [f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3" fill="{colour}"/>' for across, down in places]
        for (across, down), name in zip(places, one.names, strict=False):
            # At the right edge to the left of its point; and on a ground of its own where a curve goes through it.
            is_last = across > WIDTH - 60
            parts.append(
                _text(across - 5 if is_last else across + 5, down - 6, name, "end" if is_last else "start", _ON_CURVES)
            )
        column, row = number % per_row, number // per_row
        left, middle = _LEFT + column * _LEGEND_COLUMN, _TOP + row * _LEGEND_ROW
        parts.append(f'<rect x="{left}" y="{middle - 4}" width="14" height="4" fill="{colour}"/>')
        parts.append(_text(left + 20, middle + 2, one.label, "start"))
    return _svg(title, height, parts)


def distribution(label: str, values: Sequence[float]) -> Series:
    """The share of values that are at most x, thinned to what a plot can show."""
    ordered = sorted(values)
    count = len(ordered)
    ranks = sorted({round(place * (count - 1) / (_MOST_POINTS - 1)) for place in range(_MOST_POINTS)}) if count else []
    return Series(label, [(ordered[rank], (rank + 1) / count) for rank in ranks])


def waterfall(title: str, parts: Sequence[tuple[str, float]], names: Sequence[str]) -> str:
    """Milliseconds by part, each bar beginning where the one before it ended.

    Args:
        title: Title of the plot.
        parts: Name and milliseconds of each part that there is.
        names: All names that there may be: a part has the same colour whichever others are beside it.
    """
    total = sum(value for _, value in parts) or 1.0
    row, label_width, value_width = 22, 120, 120
    scale = (WIDTH - label_width - value_width) / total
    drawn: list[str] = []
    start = 0.0
    for number, (name, value) in enumerate(parts):
        top = 8 + row * number
        colour = _PART_COLOURS[names.index(name) % len(_PART_COLOURS)]
        left, width = label_width + scale * start, max(0.5, scale * value)
        drawn.append(_text(label_width - 8, top + 13, name, "end"))
        drawn.append(f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="16" fill="{colour}"/>')
        drawn.append(_text(left + width + 6, top + 13, f"{value:,.2f} ms, {value / total:.1%}", "start"))
        start += value
    return _svg(title, 16 + row * len(parts), drawn)


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
