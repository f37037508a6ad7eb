"""Does a basis still fit the data? Watches the captured energy of every saved tensor.

After a calibration the first steps set what the basis is worth (the baseline). If later an exponential mean stays
below the baseline by more than a margin for some steps in a row, the basis is due for a refresh. Hysteresis: the count
of low steps starts over only once the mean has come back to within half the margin; and two refreshes are never closer
than ``interval`` steps. Pure arithmetic on numbers; knows nothing of sessions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class EnergyMonitor:
    """Its state is plain numbers, so that a checkpoint can hold it: see :meth:`to_plain`."""

    margin: float = 0.02
    patience: int = 3
    interval: int = 20
    baseline_steps: int = 5
    smoothing: float = 0.2
    seen: int = 0
    baseline: dict[str, float] = field(default_factory=dict)
    mean: dict[str, float] = field(default_factory=dict)
    low: dict[str, int] = field(default_factory=dict)

    def restart(self) -> None:
        """Forget everything measured: the basis is new."""
        self.seen = 0
        self.baseline, self.mean, self.low = {}, {}, {}

    def observe(self, energy: Mapping[str, float]) -> str | None:
        """Take in one step's captured energies; return the name of a tensor whose basis is due for a refresh."""
        self.seen += 1
        due = None
        for name, value in energy.items():
            if self.seen <= self.baseline_steps:
                self.baseline[name] = self.baseline.get(name, 0.0) + (value - self.baseline.get(name, 0.0)) / self.seen
                self.mean[name] = self.baseline[name]
                continue
            if name not in self.baseline:
                continue
            self.mean[name] += self.smoothing * (value - self.mean[name])
            if self.mean[name] < self.baseline[name] - self.margin:
                self.low[name] = self.low.get(name, 0) + 1
            elif self.mean[name] > self.baseline[name] - self.margin / 2:
                self.low[name] = 0
            if self.low.get(name, 0) >= self.patience and self.seen >= self.interval and due is None:
                due = name
        return due

    def to_plain(self) -> dict[str, Any]:
        """Return the state as JSON data."""
        return asdict(self)

    @staticmethod
    def from_plain(data: Mapping[str, Any]) -> EnergyMonitor:
        """Return the monitor that :meth:`to_plain` described."""
        return EnergyMonitor(**data)
