"""The Pareto front of plans: as a table, as characters in the terminal, as SVG. Knows the planner's front."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from edgetune.commands._plot import Frame, document, dots, evenly, line
from edgetune.units import MIB

if TYPE_CHECKING:
    from edgetune.planning.per_layer import Front, FrontPoint

_MARKS = "ox+*#%&@"
_COLORS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
_MIXED_COLOR = "#ff7f0e"
Series = dict[str, list["FrontPoint"]]


def show_front(front: Front) -> None:
    """Print the table and, below it, the picture."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False)
    table = Table(
        title="least total gradient error by peak",
        caption="error: sum over the saved tensors of the relative error of their weight gradients, as calibrated",
    )
    for column in ("peak MiB", "saved MiB", "error", "codecs"):
        table.add_column(column, justify="left" if column == "codecs" else "right")
    for point in front.mixed:
        sizes = f"{point.peak_bytes / MIB:.2f}", f"{point.saved_bytes / MIB:.2f}"
        table.add_row(*sizes, f"{point.error:.4f}", codecs_of(point))
    console.print(table)
    console.print("\n".join(drawn(front, max(40, min(console.width, 100)))), soft_wrap=True, highlight=False)


def codecs_of(point: FrontPoint) -> str:
    """Return how many tensors each codec keeps, such as ``5 hosvd, 2 dense``."""
    labels = list(point.selection.values())
    return ", ".join(f"{labels.count(label)} {label}" for label in sorted(set(labels), key=labels.index))


def series_of(front: Front) -> Series:
    """Return the uniform points by codec."""
    found: Series = {}
    for point in front.uniform:
        found.setdefault(point.label, []).append(point)
    return found


def drawn(front: Front, width: int = 80, height: int = 20) -> list[str]:
    """Return the picture as lines of at most ``width`` characters: peak to the right, error upwards."""
    series = series_of(front)
    columns = width - 10
    x_of, y_of, ends = _scales(front, columns - 1, height - 1)
    grid = [[" "] * columns for _ in range(height)]
    marks = dict(zip(series, (_MARKS[i % len(_MARKS)] for i in range(len(series))), strict=True))
    for label, points in series.items():
        for point in points:
            grid[round(y_of(point.error))][round(x_of(point.peak_bytes))] = marks[label]
    for point in front.mixed:
        grid[round(y_of(point.error))][round(x_of(point.peak_bytes))] = "●"
    low, high, most = ends
    scale = {0: f"{most:.3f}", height - 1: "0"}
    lines = [f"{scale.get(row, ''):>8} │{''.join(cells)}" for row, cells in enumerate(grid)]
    left, right = f"{low / MIB:.1f} MiB", f"{high / MIB:.1f} MiB"
    lines.append(f"{'':>8} └{'─' * columns}")
    lines.append(f"{'':>10}{left}{right:>{max(1, columns - len(left))}}")
    lines.append(f"{'':>10}● per-layer" + "".join(f"   {mark} {label}" for label, mark in marks.items()))
    return [line.rstrip() for line in lines]


def svg(front: Front, title: str) -> str:
    """Return the picture as an SVG document."""
    frame = Frame()
    x_of, y_of, (low, high, most) = _scales(front, 1.0, 1.0)
    parts = frame.axes(
        evenly(low, high, "{:.1f}", 1 / MIB), evenly(0, most, "{:.3f}"),
        "predicted peak of the process, MiB", "total gradient error",
    )  # fmt: skip
    everyone = [("per-layer", front.mixed, _MIXED_COLOR, ' stroke-width="2"')]
    for index, (label, points) in enumerate(series_of(front).items()):
        everyone.append((label, tuple(points), _COLORS[index % len(_COLORS)], ' stroke-dasharray="4 3"'))
    for row, (label, drawn_points, color, style) in enumerate(everyone):
        places = [frame.at(x_of(point.peak_bytes), 1 - y_of(point.error)) for point in drawn_points]
        parts += [line(places, color, style), *dots(places, color, 3), *frame.legend(row, label, color)]
    return document(parts, 820, 440, title, frame.middle)


def _scales(
    front: Front, width: float, height: float
) -> tuple[Callable[[float], float], Callable[[float], float], tuple[int, int, float]]:
    """Return where a peak and an error lie in a picture of this size (0, 0: above, left), and the ends of its axes."""
    every = [*front.mixed, *front.uniform]
    low, high = min(p.peak_bytes for p in every), max(p.peak_bytes for p in every)
    most = max(p.error for p in every) or 1.0
    return (
        lambda peak: width * (peak - low) / max(high - low, 1),
        lambda error: height * (1 - error / most),
        (low, high, most),
    )
