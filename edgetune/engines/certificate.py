"""The energy certificate: do the bases still suit the data? Judges the captured energy that every step measures.

Pure arithmetic on numbers, for whoever trains: it says that a refresh is due and is told that one was done. Knows
nothing of sessions, plans and files; its state is small and plain, so a checkpoint can hold it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

LEAST_MARGIN, MOST_MARGIN = 0.002, 0.02
"""A fall counts when half as much energy again is lost as promised, but within these bounds: at 0.999 a loss of 0.002
more doubles the error of a gradient, at 0.5 it is nothing."""
NOISES = 4.0
"""A fall counts when it exceeds this many standard deviations of the energy from step to step."""
PATIENCE = 2
"""Low steps in a row before a refresh is due: one odd batch is none."""
REFERENCE_STEPS = 8
"""Steps after a refresh whose mean energy is what the new bases are worth."""
INTERVAL = 20
"""Steps from a refresh that did not help to the next, doubled after each that did not."""
MOST_DOUBLINGS = 6
SMOOTHING = 0.5
_MOST_DIFFERENCES = 32
_NORMAL = math.sqrt(math.pi) / 2
"""Standard deviation of a normal variable by the mean distance of two draws; a change of level hardly disturbs it."""


class Kind(str, Enum):
    """What was found of one saved tensor.

    FALLEN: its energy is below what was promised; a refresh is due. MENDED: the refresh has brought the energy back.
    SHORT: it has not; what the tensor now captures is the new reference, so that this is said once.
    """

    FALLEN = "fallen"
    MENDED = "mended"
    SHORT = "short"


@dataclass(frozen=True)
class Finding:
    """A change of state of the saved tensor ``tensor``: what was promised of its captured energy, and what it is."""

    kind: Kind
    tensor: str
    promised: float
    measured: float


@dataclass
class Track:
    """What is known of one tensor since the last refresh.

    Attributes:
        bound: what the plan promises (None: nothing). reference: mean of the first steps. seen: how many steps.
        mean: smoothed energy. last: of the last step. noise: standard deviation from step to step. low: low steps in a
            row. least: the energy that the first of them fell short of.
    """

    bound: float | None = None
    reference: float = 0.0
    seen: int = 0
    mean: float = 0.0
    last: float = 0.0
    noise: float = 0.0
    low: int = 0
    least: float = 0.0

    @property
    def promised(self) -> float | None:
        """The energy to be kept: the plan's bound, or the reference once it is known and higher.

        The bound is proven on the calibration's data but far from tight; the reference is tight, but measured on
        whatever came after. Both are needed: the first finds bases that were wrong from the start, the second any fall.
        """
        if self.seen < REFERENCE_STEPS:
            return self.bound
        return self.reference if self.bound is None else max(self.bound, self.reference)

    def margin(self, promised: float) -> float:
        """Return by how much the energy may fall short."""
        # Few differences may by chance be small ones: at first the noise may be half as large again as it looks.
        doubt = 1 + 4 / min(max(self.seen, 1), _MOST_DIFFERENCES)
        return max(min(MOST_MARGIN, max(LEAST_MARGIN, (1.0 - promised) / 2)), NOISES * doubt * self.noise)

    def take(self, value: float) -> None:
        """Take in the energy of one step."""
        promised = self.promised
        # As known before this step: a fall should not widen the margin by which it is judged.
        margin = 0.0 if promised is None else self.margin(promised)
        if self.seen:
            share = 1 / min(self.seen, _MOST_DIFFERENCES)
            self.noise += share * (_NORMAL * abs(value - self.last) - self.noise)
            self.mean += SMOOTHING * (value - self.mean)
        else:
            self.mean = value
        self.seen += 1
        self.last = value
        if self.seen <= REFERENCE_STEPS:
            self.reference += (value - self.reference) / self.seen
        if promised is None:
            return
        if max(value, self.mean) < promised - margin:
            self.least = self.least if self.low else promised - margin
            self.low += 1
        elif value > promised - margin / 2:
            self.low = 0


@dataclass
class Certificate:
    """The certificate of all lossily saved tensors of a run. Deterministic; :meth:`to_plain` holds all of its state.

    Feed it every step (:meth:`observe`). When :attr:`due` is not empty, measure new bases and say so
    (:meth:`refreshed`), or that it could not be done (:meth:`failed`, :meth:`accept`). Laws:

    1. between two refreshes a tensor is found FALLEN once; energy that stays low is not a new fall.
    2. a refresh that did not bring the energy back is followed by at least ``INTERVAL`` steps without another, twice
       as many after each further one; one that did is followed by ``REFERENCE_STEPS``.
    3. an energy that is not finite says nothing of the bases, and is left out.
    """

    tracks: dict[str, Track] = field(default_factory=dict)
    fallen: dict[str, float] = field(default_factory=dict)
    pending: dict[str, tuple[float, float]] = field(default_factory=dict)
    steps: int = 0
    not_before: int = 0
    refreshed_at: int = 0
    failures: int = 0
    refreshes: int = 0

    @property
    def due(self) -> tuple[str, ...]:
        """The tensors for whose sake a refresh is due."""
        return tuple(self.fallen)

    def standing(self) -> dict[str, dict[str, float | None]]:
        """Return per saved tensor the energy ``promised`` (None: not known yet) and ``measured`` (smoothed)."""
        tracks = {name: track for name, track in self.tracks.items() if track.seen}
        return {name: {"promised": track.promised, "measured": track.mean} for name, track in tracks.items()}

    def observe(self, energy: Mapping[str, float]) -> list[Finding]:
        """Take in the captured energy of one step, by saved tensor; return what changed with it."""
        self.steps += 1
        for name, value in energy.items():
            if math.isfinite(value):
                self.tracks.setdefault(name, Track()).take(value)
        found = self._judge()
        if self.fallen:
            if not any(self.tracks[name].low for name in self.fallen):
                self.fallen = {}  # it came back by itself before anybody acted
            return found
        if self.steps < self.not_before or all(track.low < PATIENCE for track in self.tracks.values()):
            return found
        for name, track in self.tracks.items():
            promised = track.promised
            if track.low and promised is not None:
                self.fallen[name] = promised
                found.append(Finding(Kind.FALLEN, name, promised, track.mean))
        return found

    def _judge(self) -> list[Finding]:
        """Return what the last refresh did for the tensors that had fallen, once that is known."""
        found = []
        for name, (promised, least) in list(self.pending.items()):
            track = self.tracks.get(name)
            if track is None or track.seen < REFERENCE_STEPS:
                continue
            del self.pending[name]
            kind = Kind.MENDED if track.reference >= least else Kind.SHORT
            found.append(Finding(kind, name, promised, track.reference))
        if not found:
            return found
        if any(finding.kind is Kind.SHORT for finding in found):
            self.failures += 1
            self.not_before = self.refreshed_at + self._interval()
        elif not self.pending:
            self.failures, self.not_before = 0, self.steps
        return found

    def refreshed(self, bounds: Mapping[str, float]) -> None:
        """Begin anew with new bases; ``bounds`` is what the plan now promises, by saved tensor (as far as it does)."""
        self.pending = {}
        for name, promised in self.fallen.items():
            self.pending[name] = promised, self.tracks[name].least
        self.refreshes += 1
        self.refreshed_at = self.steps
        self.not_before = self.steps + self._interval()
        self._restart(bounds)

    def failed(self) -> None:
        """Note that the refresh that was due could not be made; another is due after a while if it still is."""
        self.fallen = {}
        self.not_before = self.steps + self._interval()
        self.failures += 1

    def accept(self, names: Iterable[str]) -> None:
        """Take the present energy of some fallen tensors for what is to be expected: nothing can mend it."""
        for name in names:
            self.tracks[name] = Track()
            del self.fallen[name]

    def restart(self, bounds: Mapping[str, float]) -> None:
        """Begin anew for another plan (other ranks or codecs), whatever was found before."""
        self.pending = {}
        self._restart(bounds)

    def _restart(self, bounds: Mapping[str, float]) -> None:
        self.tracks = {name: Track(bound) for name, bound in bounds.items()}
        self.fallen = {}

    def _interval(self) -> int:
        return INTERVAL << min(self.failures, MOST_DOUBLINGS)

    def to_plain(self) -> dict[str, Any]:
        """Return the state as JSON data."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_plain(data: Mapping[str, Any]) -> Certificate:
        """Return the certificate that :meth:`to_plain` described."""
        tracks = {name: Track(**track) for name, track in data["tracks"].items()}
        pending = {name: (float(promised), float(least)) for name, (promised, least) in data["pending"].items()}
        return Certificate(**{**data, "fallen": dict(data["fallen"]), "tracks": tracks, "pending": pending})
