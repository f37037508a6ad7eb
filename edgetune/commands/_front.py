"""The Pareto front of plans: as a table, as characters in the terminal, as SVG. Knows the planner's front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

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
    left, top, width, height = 70, 40, 560, 340
    x_of, y_of, (low, high, most) = _scales(front, width, height)

    def at(point: FrontPoint) -> tuple[float, float]:
        return left + x_of(point.peak_bytes), top + y_of(point.error)

    def text(x: float, y: float, words: str, anchor: str = "middle", extra: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(words)}</text>'

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 440" font-family="sans-serif" font-size="12">',
        '<rect width="820" height="440" fill="white"/>',
        text(left + width / 2, 22, title, extra=' font-size="14"'),
    ]
    for step in range(5):
        x, y = left + width * step / 4, top + height * step / 4
        parts.append(f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{top + height}" stroke="#dddddd"/>')
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + width}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(text(x, top + height + 18, f"{(low + (high - low) * step / 4) / MIB:.1f}"))
        parts.append(text(left - 8, y + 4, f"{most * (4 - step) / 4:.3f}", "end"))
    parts.append(text(left + width / 2, top + height + 40, "predicted peak of the process, MiB"))
    middle = top + height / 2
    parts.append(text(18, middle, "total gradient error", extra=f' transform="rotate(-90 18 {middle:.1f})"'))
    for i, (label, points) in enumerate(series_of(front).items()):
        parts += _series(label, [at(p) for p in points], _COLORS[i % len(_COLORS)], top + 20 + 20 * (i + 1), dash="4 3")
    parts += _series("per-layer", [at(p) for p in front.mixed], _MIXED_COLOR, top + 20, dash="")
    return "\n".join((*parts, "</svg>", ""))


def _series(label: str, places: Sequence[tuple[float, float]], color: str, legend_y: float, dash: str) -> list[str]:
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    style = f' stroke-dasharray="{dash}"' if dash else ' stroke-width="2"'
    parts = [f'<polyline points="{line}" fill="none" stroke="{color}"{style}/>']
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places]
    parts.append(f'<circle cx="650" cy="{legend_y - 4:.1f}" r="4" fill="{color}"/>')
    parts.append(f'<text x="660" y="{legend_y:.1f}">{escape(label)}</text>')
    return parts


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
