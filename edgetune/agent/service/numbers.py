"""What a monitor is shown: numbers that are read off the events of the run log as they are made. Knows no library."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgetune.agent.service.states import State

# What is read off which event: name of the family, the event's field, what it means.
GAUGES = {
    "step": (
        ("step", "step", "Number of the last step of the state directory."),
        ("epoch", "epoch", "Pass over the samples (0-based)."),
        ("loss", "loss", "Loss of the last batch, before its update."),
        ("batch_accuracy", "accuracy", "Accuracy on the last batch, before its update."),
        ("epsilon", "epsilon", "Energy kept per mode."),
        ("peak_bytes", "measured_peak_bytes", "Most memory that the last step took."),
        ("predicted_peak_bytes", "predicted_peak_bytes", "What the plan predicts of it."),
        ("resident_bytes", "resident_bytes", "Memory of the process before the last step."),
        ("budget_bytes", "budget_bytes", "The budget that was asked for."),
        ("effective_budget_bytes", "effective_budget_bytes", "The budget, or what there is, whichever is less."),
        ("step_joules", "joules", "What the board took during the last step."),
    ),
    "evaluated": (("heldout_accuracy", "accuracy", "Accuracy on the held-out samples."),),
    "checkpoint": (
        ("checkpoint_step", "step", "Step of the newest checkpoint."),
        ("checkpoint_bytes", "bytes", "Size of the newest checkpoint."),
        ("checkpoint_timestamp_seconds", "time", "When it was written, in seconds since the epoch."),
    ),
    "promoted": (("promoted_version", "version", "Number of the promoted version of the model."),),
}
BOARD = (
    ("temperature_celsius", "celsius", "Temperature of the hottest zone."),
    ("power_watts", "watts", "What the board takes."),
)
"""Beside every peak, whatever the event."""
COUNTERS = {
    "step": (
        ("steps", None, "Steps made by this process."),
        ("samples_trained", "samples", "Samples trained by this process."),
        ("energy_joules", "joules", "What the board took during the steps of this process."),
    ),
    "arrived": (("samples_arrived", "samples", "Samples taken in by this process."),),
}


@dataclass(frozen=True)
class Family:
    """One family of numbers: ``values`` by the value of the label ``label`` (None: one number, under "")."""

    name: str
    help: str
    kind: str
    label: str | None
    values: dict[str, float]


@dataclass
class Numbers:
    """The numbers of one agent. Written by the agent's thread, read by the exporter's."""

    gauges: dict[str, float] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    events: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    state: str = ""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def take(self, record: Mapping[str, Any]) -> None:
        """Read what a record of the run log says."""
        kind = str(record["event"])
        with self._lock:
            self.events[kind] = self.events.get(kind, 0) + 1
            if kind == "state":
                self.state = str(record["state"])
            for name, entry, _ in (*GAUGES.get(kind, ()), *BOARD):
                if isinstance(value := record.get(entry), int | float):
                    self.gauges[name] = float(value)
                elif entry in record:  # not known any more
                    self.gauges.pop(name, None)
            for name, counted, _ in COUNTERS.get(kind, ()):
                value = 1 if counted is None else record.get(counted)
                if isinstance(value, int | float):
                    self.counters[name] = self.counters.get(name, 0.0) + value
            if kind == "step":
                known = [value for value in record.get("energy", {}).values() if value is not None]
                if known:
                    self.gauges["captured_energy"] = min(known)
            for phase, value in (record.get("seconds") or {}).items():
                self.seconds[phase] = self.seconds.get(phase, 0.0) + value

    def counted(self, samples: Mapping[str, int]) -> None:
        """Take what the ledger counts, by status."""
        with self._lock:
            self.samples = dict(samples)

    def families(self) -> list[Family]:
        """Return all that is known now."""
        with self._lock:
            made = [
                Family("state", "1 for the state of the agent, 0 for the others.", "gauge", "state",
                       {state.value: float(state.value == self.state) for state in State}),
                Family("events", "Events of the run log, by kind.", "counter", "event", dict(self.events)),
                Family("phase_seconds", "Seconds spent, by phase.", "counter", "phase", dict(self.seconds)),
                Family("samples", "Samples in the ledger, by status.", "gauge", "status",
                       {name: float(count) for name, count in self.samples.items()}),
            ]  # fmt: skip
            told = [entry for entries in GAUGES.values() for entry in entries]
            told += [*BOARD, ("captured_energy", "", "Least energy that the last step captured of a saved tensor.")]
            for name, _, text in told:
                if name in self.gauges:
                    made.append(Family(name, text, "gauge", None, {"": self.gauges[name]}))
            for name, _, text in (entry for entries in COUNTERS.values() for entry in entries):
                made.append(Family(name, text, "counter", None, {"": self.counters.get(name, 0.0)}))
            return made
