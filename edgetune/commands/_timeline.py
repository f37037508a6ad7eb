"""What a plan takes, told in full: what is alive at the worst instant as a table, live bytes over one iteration as SVG.

Knows the planner's curves and the records of a run log.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from edgetune.commands._plot import Frame, Place, area, document, evenly, line, text
from edgetune.units import MIB, format_bytes

if TYPE_CHECKING:
    from edgetune.agent.sampling import SampledStep
    from edgetune.planning.curve import Curve, Explanation, Stretch

_COLORS = {
    "fixed": "#c7c7c7", "saved": "#d62728", "features": "#1f77b4", "gradients": "#ff9f40", "transient": "#6baed6",
    "workspace": "#9467bd",
}  # fmt: skip
_MEASURED = "#000000"
_SHARES = {"trunk": 1.0, "train": 3.0, "accumulate": 0.5, "update": 1.0}
"""How wide a phase is drawn beside the others: its own nodes are spread evenly over it."""
_MOST_ROWS = 40


def show_explanation(found: Explanation) -> None:
    """Print the lines that are always there and the largest of what is alive."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False)
    table = Table(title=f"alive at the peak of {found.phase}: while '{found.node}' runs")
    for column in ("tensor", "kind", "bytes", "made by", "last read by"):
        table.add_column(column, justify="right" if column == "bytes" else "left")
    for name, size in found.fixed.items():
        if size:
            table.add_row(name, "fixed", format_bytes(size), "", "")
    table.add_section()
    for row in found.alive[:_MOST_ROWS]:
        table.add_row(row.name, row.kind, format_bytes(row.bytes), row.made_by, row.last_read_by)
    if rest := found.alive[_MOST_ROWS:]:
        table.add_row(f"{len(rest)} smaller", "", format_bytes(sum(row.bytes for row in rest)), "", "")
    table.add_section()
    table.add_row("peak of the process", "", format_bytes(found.peak_bytes), "", "")
    console.print(table)


def measured_in(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return the measured bytes by phase of the last event ``timeline`` of a run log; empty where there is none."""
    found: dict[str, int] = {}
    for record in records:
        if record.get("event") == "timeline":
            phases = record.get("phases", {})
            found = {
                name: int(phase["measured_bytes"])
                for name, phase in phases.items()
                if phase.get("measured_bytes") is not None
            }
    return found


def svg(curve: Curve, title: str, peaks: Mapping[str, int], step: SampledStep | None = None) -> str:
    """Return the picture: predicted bytes stacked over the nodes of each phase, measured ones over them.

    Args:
        peaks: measured high-water marks by phase, each drawn as a line over its phase.
        step: a sampled step, drawn as a curve; within a phase its samples are spread by time, not by node.
    """
    frame = Frame(width=720, height=360)
    base = curve.fixed_bytes + curve.correction_bytes
    everything = [curve.peak_bytes, *peaks.values(), *(step.resident_bytes if step is not None else ())]
    most = math.ceil(max(everything) * 1.03 / MIB) * MIB
    parts = frame.axes([], evenly(0, most, "{:.0f}", 1 / MIB), "", "MiB")
    drawn = [stretch for stretch in curve.stretches if stretch.nodes]
    whole = sum(_SHARES[stretch.phase] for stretch in drawn) or 1.0
    parts.append(_band(frame, 0.0, 1.0, [0], [base], most, _COLORS["fixed"]))
    begin, ends, used = 0.0, {}, ["fixed"]
    for stretch in drawn:
        width = _SHARES[stretch.phase] / whole
        parts += _stretch(frame, stretch, begin, width, base, most, used)
        ends[stretch.phase] = begin, width
        begin += width
    for phase, (start, width) in ends.items():
        if phase in peaks:
            y = peaks[phase] / most
            style = ' stroke-width="1.5" stroke-dasharray="6 3"'
            parts.append(line([frame.at(start, y), frame.at(start + width, y)], _MEASURED, style))
        if step is not None and phase in step.ends:
            points = [frame.at(start + width * share, size / most) for share, size in step.stretch(phase)]
            parts.append(line(points, _MEASURED, ' stroke-width="1"'))
    for row, name in enumerate(used):
        parts += frame.legend(row, name, _COLORS[name])
    if ends.keys() & peaks.keys():
        parts += frame.legend(len(used), "measured: peak (dashed)", _MEASURED)
    if step is not None:
        parts += frame.legend(len(used) + 1, "measured: every ms", _MEASURED)
    return document(parts, 1000, 460, title, frame.middle)


def _stretch(
    frame: Frame, stretch: Stretch, begin: float, width: float, base: int, most: int, used: list[str]
) -> list[str]:
    """Return one phase: its bands one above the other, its border and its name; bands are noted in ``used``."""
    below = [base] * len(stretch.nodes)
    parts = []
    for name, usage in stretch.bands.items():
        if any(usage):
            above = [low + size for low, size in zip(below, usage, strict=True)]
            parts.append(_band(frame, begin, width, below, above, most, _COLORS[name]))
            below = above
            if name not in used:
                used.append(name)
    x, bottom = frame.at(begin + width, 0)
    parts.append(line([(x, bottom), frame.at(begin + width, 1)], "#888888", ' stroke-width="0.5"'))
    times = f" × {stretch.runs}" if stretch.runs > 1 else ""
    middle, _ = frame.at(begin + width / 2, 0)
    parts.append(text(middle, bottom + 18, f"{stretch.phase}{times}"))
    parts.append(text(middle, bottom + 34, f"{len(stretch.nodes)} nodes"))
    return parts


def _band(frame: Frame, begin: float, width: float, below: list[int], above: list[int], most: int, color: str) -> str:
    """Return the area between two curves of steps, one step per node."""

    def steps(values: list[int]) -> list[Place]:
        places = []
        for index, value in enumerate(values):
            if index == 0 or value != values[index - 1]:
                places.append(frame.at(begin + width * index / len(values), value / most))
            if index + 1 == len(values) or value != values[index + 1]:
                places.append(frame.at(begin + width * (index + 1) / len(values), value / most))
        return places

    return area([*steps(above), *reversed(steps(below))], color)
