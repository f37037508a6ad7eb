"""What a person sees while the agent runs: a live panel on a terminal, plain lines elsewhere, or nothing.

Knows numbers and words to show; nothing of where they come from.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from edgetune.units import format_bytes


@dataclass
class Snapshot:
    """The numbers of one instant. None: not known (yet)."""

    step: int = 0
    steps_total: int | None = None
    epoch: int = 0
    loss: float | None = None
    accuracy: float | None = None
    heldout_accuracy: float | None = None
    measured_peak_bytes: int = 0
    predicted_peak_bytes: int = 0
    budget_bytes: int | None = None
    epsilon: float | None = None
    energy: float | None = None
    codecs: str = ""
    condition: str = "running"
    refreshes: int = 0
    quarantined: int = 0
    steps_per_second: float = 0.0


class View(Protocol):
    """Shows snapshots and messages."""

    def update(self, now: Snapshot) -> None: ...
    def event(self, message: str) -> None: ...
    def close(self) -> None: ...


class QuietView:
    """Shows nothing."""

    def update(self, now: Snapshot) -> None: ...
    def event(self, message: str) -> None: ...
    def close(self) -> None: ...


class PlainView:
    """One line per ``every`` steps and per message: for pipes and service logs."""

    def __init__(self, every: int = 10) -> None:
        self.every = every
        self._printed = 0

    def update(self, now: Snapshot) -> None:
        """Print the line of this step if it is its turn."""
        if now.step != self._printed and (now.step % self.every == 0 or now.step == 1):
            self._printed = now.step
            print(", ".join(f"{name} {value}" for name, value in _lines(now)), flush=True)

    def event(self, message: str) -> None:
        """Print a message."""
        print(message, flush=True)

    def close(self) -> None:
        """Nothing to undo."""


class LiveView:
    """A panel that is drawn again with every step."""

    def __init__(self) -> None:
        from rich.live import Live

        self._now = Snapshot()
        self._message = ""
        self._drawn = 0.0
        self._live = Live(self._panel(), refresh_per_second=4, transient=False)
        self._live.start()

    def update(self, now: Snapshot) -> None:
        """Show new numbers (at most four times a second: drawing costs time that belongs to training)."""
        self._now = now
        if time.monotonic() - self._drawn > 0.25:
            self._draw()

    def event(self, message: str) -> None:
        """Show the last event."""
        self._message = message
        self._draw()

    def close(self) -> None:
        """Draw the final state and give the terminal back."""
        self._draw()
        self._live.stop()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._live.update(self._panel(), refresh=True)

    def _panel(self) -> Any:
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        now, table = self._now, Table.grid(padding=(0, 2))
        if now.steps_total:
            table.add_row("progress", ProgressBar(total=now.steps_total, completed=now.step, width=40))
        limit_bytes = now.budget_bytes or max(now.measured_peak_bytes, now.predicted_peak_bytes)
        if limit_bytes:
            used_bytes = min(now.measured_peak_bytes, limit_bytes)
            table.add_row("memory of budget", ProgressBar(total=limit_bytes, completed=used_bytes, width=40))
        for name, value in _lines(now):
            table.add_row(name, value)
        table.add_row("last event", self._message)
        return Panel(table, title="EdgeTune", expand=False)


def make_view(*, quiet: bool) -> View:
    """Return the view that suits where standard output goes."""
    if quiet:
        return QuietView()
    return LiveView() if sys.stdout.isatty() else PlainView()


def _lines(now: Snapshot) -> Iterable[tuple[str, str]]:
    total = f"/{now.steps_total}" if now.steps_total else ""
    yield "step", f"{now.step}{total} (pass {now.epoch + 1}, {now.steps_per_second:.2f} steps/s)"
    if now.loss is not None:
        yield "loss", f"{now.loss:.4f}"
    if now.accuracy is not None:
        yield "batch accuracy", f"{now.accuracy:.1%}"
    if now.heldout_accuracy is not None:
        yield "held-out accuracy", f"{now.heldout_accuracy:.1%}"
    budget = "no budget" if now.budget_bytes is None else f"budget {format_bytes(now.budget_bytes)}"
    yield (
        "memory",
        f"measured {format_bytes(now.measured_peak_bytes)}, predicted {format_bytes(now.predicted_peak_bytes)}, "
        f"{budget}",
    )
    if now.epsilon is not None:
        yield "ε", f"{now.epsilon:.4f}" + ("" if now.energy is None else f" (captured energy {now.energy:.4f})")
    if now.condition != "running":
        yield "condition", now.condition
    if now.codecs:
        yield "codecs", now.codecs
    if now.refreshes:
        yield "refreshes", str(now.refreshes)
    yield "quarantined", str(now.quarantined)
