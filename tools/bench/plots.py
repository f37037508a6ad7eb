"""Plots as SVG text: points and lines on logarithmic or linear axes, and bars of stacked parts. Knows `_plot`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgetune.commands._plot import Frame, document, dots, line, text

COLORS = (
    "#3366cc", "#dc3912", "#ff9900", "#109618", "#990099", "#0099c6", "#dd4477", "#66aa00", "#b82e2e", "#316395",
    "#994499", "#22aa99", "#aaaa11", "#6633cc", "#e67300",
)  # fmt: skip
Points = Sequence[tuple[float, float]]
_FRAME = Frame(left=80, width=520)


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
    x_ticks, x_of = _scale([p[0] for p in every], x.logarithmic)
    y_ticks, y_of = _scale([p[1] for p in every], y.logarithmic)
    parts = _FRAME.axes(
        [(x_of(tick), _number(tick)) for tick in x_ticks], [(y_of(tick), _number(tick)) for tick in y_ticks],
        x.label, y.label,
    )  # fmt: skip
    for index, (name, points) in enumerate(series.items()):
        color = COLORS[index % len(COLORS)]
        places = [_FRAME.at(x_of(a), y_of(b)) for a, b in points]
        if joined:
            parts.append(line(places, color))
        parts += [*dots(places, color, 4), *_FRAME.legend(index, name, color)]
    return document(parts, 860, 440, title)


def bars(rows: Mapping[str, Mapping[str, float]], title: str, label: str) -> str:
    """Return a picture with one bar per row, of its parts side by side; all rows have the same parts.

    Raises:
        ValueError: there is no row, or all are zero.
    """
    most = max((sum(parts.values()) for parts in rows.values()), default=0.0)
    if most <= 0:
        raise ValueError(f"'{title}' has no bar to draw")
    names = list(dict.fromkeys(part for parts in rows.values() for part in parts))
    high = 22
    frame = Frame(left=170, width=600, height=high * len(rows))
    drawn = frame.axes([(step / 4, _number(most * step / 4)) for step in range(5)], [], label)
    for index, (name, parts) in enumerate(rows.items()):
        top, begin = frame.top + high * index + 3, frame.left
        drawn.append(text(frame.left - 8, top + 12, name, "end"))
        for part, value in parts.items():
            extent = frame.width * value / most
            color = COLORS[names.index(part) % len(COLORS)]
            drawn.append(f'<rect x="{begin:.1f}" y="{top}" width="{extent:.1f}" height="{high - 6}" fill="{color}"/>')
            begin += extent
    end = frame.top + frame.height
    for index, part in enumerate(names):
        color, place = COLORS[index % len(COLORS)], frame.left + 110 * index
        drawn += [*dots([(place, end + 58)], color, 4), text(place + 10, end + 62, part, "start")]
    return document(drawn, 860, end + 80, title)


class _Scale:
    """Where a value lies along an axis, as a share of it; callable."""

    def __init__(self, low: float, high: float, logarithmic: bool) -> None:
        self._of = math.log if logarithmic else float
        self._low, self._high = self._of(low), self._of(high)

    def __call__(self, value: float) -> float:
        return (self._of(value) - self._low) / (self._high - self._low)


def _scale(values: Sequence[float], logarithmic: bool) -> tuple[list[float], _Scale]:
    low, high = min(values), max(values)
    if logarithmic:
        if low <= 0:
            raise ValueError(f"a logarithmic axis has no place for {low}")
        low, high = low / 1.2, high * 1.2
        ticks = [
            m * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)
        ]
        return [tick for tick in ticks if low <= tick <= high], _Scale(low, high, True)
    low, high = min(0.0, low), high * 1.05 or 1.0
    return [low + (high - low) * i / 4 for i in range(5)], _Scale(low, high, False)


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1e6 else f"{value:.0e}"
