"""Pictures as SVG text: a frame with a grid, its axes' names, a legend. What is drawn into it is the caller's.

Knows the standard library alone; the tools draw with it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

Place = tuple[float, float]
Tick = tuple[float, str]
"""A place along an axis, as a share of its length from its beginning, and what is written there."""


def text(x: float, y: float, words: str, anchor: str = "middle", extra: str = "") -> str:
    """Return ``words`` at a place; ``anchor`` is ``start``, ``middle`` or ``end``."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(words)}</text>'


def document(parts: Sequence[str], width: float, height: float, title: str, middle: float | None = None) -> str:
    """Return a picture of ``parts`` on white, with ``title`` above its ``middle`` (None: of the whole)."""
    box = f'viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" font-size="12"'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}>',
        f'<rect width="{width:g}" height="{height:g}" fill="white"/>',
        text(width / 2 if middle is None else middle, 22, title, extra=' font-size="14"'),
    ]
    return "\n".join((*head, *parts, "</svg>", ""))


def evenly(low: float, high: float, form: str, scale: float = 1.0) -> list[Tick]:
    """Return five ticks from ``low`` to ``high``, each value times ``scale`` written by the format ``form``."""
    return [(step / 4, form.format((low + (high - low) * step / 4) * scale)) for step in range(5)]


@dataclass(frozen=True)
class Frame:
    """Where the drawing lies in the picture."""

    left: float = 70
    top: float = 40
    width: float = 560
    height: float = 340

    def at(self, x: float, y: float) -> Place:
        """Return the place of shares of both axes; (0, 0) is below, left."""
        return self.left + self.width * x, self.top + self.height * (1 - y)

    @property
    def middle(self) -> float:
        """The middle of the frame, to the right."""
        return self.left + self.width / 2

    def axes(self, x: Sequence[Tick], y: Sequence[Tick], x_label: str = "", y_label: str = "") -> list[str]:
        """Return the grid with what is written along it."""
        below, right = self.top + self.height, self.left + self.width
        parts = []
        for share, words in x:
            place, _ = self.at(share, 0)
            parts.append(f'<path d="M{place:.1f} {self.top:.1f}V{below:.1f}" stroke="#dddddd"/>')
            parts.append(text(place, below + 18, words))
        for share, words in y:
            _, place = self.at(0, share)
            parts.append(f'<path d="M{self.left:.1f} {place:.1f}H{right:.1f}" stroke="#dddddd"/>')
            parts.append(text(self.left - 8, place + 4, words, "end"))
        if x_label:
            parts.append(text(self.middle, below + 40, x_label))
        if y_label:
            centre = self.top + self.height / 2
            parts.append(text(18, centre, y_label, extra=f' transform="rotate(-90 18 {centre:.1f})"'))
        return parts

    def legend(self, row: int, words: str, color: str) -> list[str]:
        """Return the entry number ``row`` of the legend, right of the frame."""
        x, y = self.left + self.width + 20, self.top + 10 + 20 * row
        return [f'<circle cx="{x:.1f}" cy="{y - 4:.1f}" r="4" fill="{color}"/>', text(x + 10, y, words, "start")]


def line(places: Sequence[Place], color: str, style: str = ' stroke-width="1.5"') -> str:
    """Return a line through ``places``; ``style`` are more of its attributes."""
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{joined}" fill="none" stroke="{color}"{style}/>'


def dots(places: Sequence[Place], color: str, radius: float = 3.5) -> list[str]:
    """Return a dot at each of ``places``."""
    return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{color}"/>' for x, y in places]


def area(outline: Sequence[Place], color: str) -> str:
    """Return a filled area without a border."""
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline)
    return f'<polygon points="{joined}" fill="{color}"/>'
