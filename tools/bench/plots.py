"""Plots as SVG text: points and lines on logarithmic or linear axes, and bars of stacked parts. Knows no library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLORS = (
    "#3366cc", "#dc3912", "#ff9900", "#109618", "#990099", "#0099c6", "#dd4477", "#66aa00", "#b82e2e", "#316395",
    "#994499", "#22aa99", "#aaaa11", "#6633cc", "#e67300",
)  # fmt: skip
Points = Sequence[tuple[float, float]]
_LEFT, _TOP, _WIDTH, _HEIGHT = 80, 40, 520, 340


@dataclass(frozen=True)
class Axis:
    """What is shown along an axis, in which unit."""

    label: str
    logarithmic: bool = True


def lines(series: Mapping[str, Points], title: str, x: Axis, y: Axis, joined: bool = True) -> str:
    """Return a picture of ``series``, each with a colour and a name; ``joined``: by lines.

    Raises:
        ValueError: there is no point, or one that is not positive on a logarithmic axis.
    """
    every = [point for points in series.values() for point in points]
    if not every:
        raise ValueError(f"'{title}' has no point to draw")
    x_ticks, x_of = _scale([p[0] for p in every], x.logarithmic, _LEFT, _LEFT + _WIDTH)
    y_ticks, y_of = _scale([p[1] for p in every], y.logarithmic, _TOP + _HEIGHT, _TOP)
    parts = _frame(title, 860)
    for tick in x_ticks:
        place = x_of(tick)
        parts.append(f'<line x1="{place:.1f}" y1="{_TOP}" x2="{place:.1f}" y2="{_TOP + _HEIGHT}" stroke="#dddddd"/>')
        parts.append(_text(place, _TOP + _HEIGHT + 18, _number(tick)))
    for tick in y_ticks:
        place = y_of(tick)
        parts.append(f'<line x1="{_LEFT}" y1="{place:.1f}" x2="{_LEFT + _WIDTH}" y2="{place:.1f}" stroke="#dddddd"/>')
        parts.append(_text(_LEFT - 8, place + 4, _number(tick), "end"))
    parts.append(_text(_LEFT + _WIDTH / 2, _TOP + _HEIGHT + 40, x.label))
    middle = _TOP + _HEIGHT / 2
    parts.append(_text(18, middle, y.label, extra=f' transform="rotate(-90 18 {middle:.1f})"'))
    for index, (name, points) in enumerate(series.items()):
        color, legend = COLORS[index % len(COLORS)], _TOP + 10 + 20 * index
        places = [(x_of(a), y_of(b)) for a, b in points]
        if joined:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{color}"/>' for a, b in places]
        parts.append(f'<circle cx="{_LEFT + _WIDTH + 20}" cy="{legend - 4}" r="4" fill="{color}"/>')
        parts.append(_text(_LEFT + _WIDTH + 30, legend, name, "start"))
    return "\n".join((*parts, "</svg>", ""))


def bars(rows: Mapping[str, Mapping[str, float]], title: str, label: str) -> str:
    """Return a picture with one bar per row, of its parts side by side; all rows have the same parts.

    Raises:
        ValueError: there is no row, or all are zero.
    """
    most = max((sum(parts.values()) for parts in rows.values()), default=0.0)
    if most <= 0:
        raise ValueError(f"'{title}' has no bar to draw")
    names = list(dict.fromkeys(part for parts in rows.values() for part in parts))
    left, width, high = 170, 600, 22
    end = _TOP + high * len(rows)
    drawn = _frame(title, 860, end + 80)
    for step in range(5):
        place = left + width * step / 4
        drawn.append(f'<line x1="{place:.1f}" y1="{_TOP}" x2="{place:.1f}" y2="{end}" stroke="#dddddd"/>')
        drawn.append(_text(place, end + 16, _number(most * step / 4)))
    drawn.append(_text(left + width / 2, end + 36, label))
    for index, (name, parts) in enumerate(rows.items()):
        top, begin = _TOP + high * index + 3, float(left)
        drawn.append(_text(left - 8, top + 12, name, "end"))
        for part, value in parts.items():
            extent = width * value / most
            color = COLORS[names.index(part) % len(COLORS)]
            drawn.append(f'<rect x="{begin:.1f}" y="{top}" width="{extent:.1f}" height="{high - 6}" fill="{color}"/>')
            begin += extent
    for index, part in enumerate(names):
        color, place = COLORS[index % len(COLORS)], left + 110 * index
        drawn.append(f'<circle cx="{place}" cy="{end + 58}" r="4" fill="{color}"/>')
        drawn.append(_text(place + 10, end + 62, part, "start"))
    return "\n".join((*drawn, "</svg>", ""))


def _frame(title: str, width: int, height: int = 440) -> list[str]:
    box = f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12"'
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(width / 2, 22, title, extra=' font-size="14"'),
    ]


def _text(x: float, y: float, words: str, anchor: str = "middle", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(words)}</text>'


class _Scale:
    """Where a value lies between two places; callable."""

    def __init__(self, low: float, high: float, logarithmic: bool, begin: float, end: float) -> None:
        self._of = math.log if logarithmic else float
        self._low, self._high, self._begin, self._end = self._of(low), self._of(high), begin, end

    def __call__(self, value: float) -> float:
        share = (self._of(value) - self._low) / (self._high - self._low)
        return self._begin + share * (self._end - self._begin)


def _scale(values: Sequence[float], logarithmic: bool, begin: float, end: float) -> tuple[list[float], _Scale]:
    low, high = min(values), max(values)
    if logarithmic:
        if low <= 0:
            raise ValueError(f"a logarithmic axis has no place for {low}")
        low, high = low / 1.2, high * 1.2
        ticks = [
            m * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)
        ]
        return [tick for tick in ticks if low <= tick <= high], _Scale(low, high, True, begin, end)
    low, high = min(0.0, low), high * 1.05 or 1.0
    return [low + (high - low) * i / 4 for i in range(5)], _Scale(low, high, False, begin, end)


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1e6 else f"{value:.0e}"
