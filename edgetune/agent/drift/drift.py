"""Does the world change, and does it pay to train? Judges the loss and the captured energy of every step, and every
evaluation; says what is to be done. Deterministic; :meth:`Drift.to_plain` holds all of its state.

Pure: knows numbers and settings; nothing of sessions, plans and files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.agent.drift.adwin import Adwin, Change
from edgetune.agent.drift.config import DriftConfig
from edgetune.agent.drift.detector import Detector

LEAST_LOSS, LEAST_ENERGY = 0.01, 0.001
"""Noise of a batch's loss, in nats, and of the captured energy that does not matter."""


@dataclass(frozen=True)
class Finding:
    """The world changed for the worse: ``what`` went from ``before`` to ``after`` (the mean of ``values`` values).
    ``actions``: what follows, of those that the settings allow."""

    what: str
    before: float
    after: float
    values: int
    actions: tuple[str, ...]

    def __str__(self) -> str:
        done = ", ".join(self.actions) or "nothing: the learning rate is still raised"
        return f"drift: {self.what} went from {self.before:.4f} to {self.after:.4f} ({done})"


class Drift:
    """Watches one run.

    - A rise of the loss or a fall of the captured energy that its detector confirms is drift. The other direction is
      what training is for; the detector begins anew there as well.
    - While the learning rate is raised, a rise of the loss may be its own doing, so nothing but a notice follows.
    - :attr:`resting` watches the losses of single samples that wait while the run is quiet: there are many, and a nat
      more or less is what matters.
    - After ``quiet_after`` evaluations without gain and without drift the run is quiet (:attr:`quiet`), until drift, or
      until somebody ends it (:meth:`wake`).
    """

    def __init__(self, config: DriftConfig) -> None:
        self.config = config
        self.loss, self.energy = Detector(config.delta, LEAST_LOSS), Detector(config.delta, LEAST_ENERGY)
        self.resting = Adwin(config.delta, clock=1)
        self.recalibration_due = False
        self.boosted_steps = 0
        self.without_gain = 0
        self.best: float | None = None
        self._kept_as = ""

    @property
    def quiet(self) -> bool:
        """Whether nothing is to be gained."""
        return 0 < self.config.quiet_after <= self.without_gain

    @property
    def rate_factor(self) -> float:
        """By what the learning rate of the next step is multiplied."""
        return self.config.boost if self.boosted_steps else 1.0

    def stepped(self, loss: float, energy: Sequence[float], kept_as: str) -> list[Finding]:
        """Take in a step that was made; return what was found.

        Args:
            loss: of its batch, before the update. energy: captured, of every saved tensor that is kept lossily.
            kept_as: names how they are kept; energies under another plan are not compared.
        """
        if kept_as != self._kept_as:
            self._kept_as = kept_as
            self.energy.reset()
        if self.boosted_steps:
            self.boosted_steps -= 1
            if not self.boosted_steps:
                self.loss.reset()
        found = []
        change = self.loss.update(loss)
        if change is not None and change.after > change.before:
            found.append(self._found("the loss", change))
        change = self.energy.update(sum(energy) / len(energy)) if energy else None
        if change is not None and change.after < change.before:
            found.append(self._found("the captured energy", change))
        return found

    def rested(self, losses: Sequence[float]) -> Finding | None:
        """Take in the losses of new samples that wait while the run is quiet."""
        for loss in losses:
            change = self.resting.update(loss)
            if change is not None and change.after > change.before:
                return self._found("the loss of waiting samples", change)
        return None

    def evaluated(self, accuracy: float | None) -> None:
        """Take in an evaluation."""
        if accuracy is None:
            return
        if self.best is None or accuracy > self.best:
            self.best, self.without_gain = accuracy, 0
        else:
            self.without_gain += 1
            if self.without_gain == self.config.quiet_after:
                self.resting.reset()

    def wake(self) -> None:
        """End a quiet time: there is something to learn, or too much to leave it lying."""
        self.without_gain = 0

    def recalibrated(self) -> None:
        """Note that new bases were measured, or could not be."""
        self.recalibration_due = False

    def _found(self, what: str, change: Change) -> Finding:
        actions = ["notice"] if "notice" in self.config.actions else []
        if not self.boosted_steps:
            if "recalibrate" in self.config.actions:
                actions.append("recalibrate")
                self.recalibration_due = True
            if "boost" in self.config.actions:
                actions.append("boost")
                self.boosted_steps = self.config.boost_steps
        self.best = None  # what was reached in another world is no measure of what can be gained in this one
        self.wake()
        return Finding(what, change.before, change.after, change.values, tuple(actions))

    def to_plain(self) -> dict[str, Any]:
        """Return the state as JSON data."""
        return {
            "loss": self.loss.to_plain(), "energy": self.energy.to_plain(), "resting": self.resting.to_plain(),
            "recalibration_due": self.recalibration_due, "boosted_steps": self.boosted_steps,
            "without_gain": self.without_gain, "best": self.best, "kept_as": self._kept_as,
        }  # fmt: skip

    def from_plain(self, data: Mapping[str, Any]) -> None:
        """Take the state that :meth:`to_plain` described; an empty one, of a checkpoint that had none, is the first."""
        fresh = Drift(self.config).to_plain() | dict(data)
        for name in ("loss", "energy", "resting"):
            getattr(self, name).from_plain(fresh[name])
        self.recalibration_due, self.boosted_steps = bool(fresh["recalibration_due"]), int(fresh["boosted_steps"])
        self.without_gain, self.best, self._kept_as = int(fresh["without_gain"]), fresh["best"], str(fresh["kept_as"])
