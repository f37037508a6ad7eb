"""The settings of drift: what is watched, what is done about it, and when there is nothing to learn."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgetune.errors import choices

ACTIONS = ("notice", "recalibrate", "boost")


@dataclass(frozen=True)
class DriftConfig:
    """What is done when the world changes, and when it does not.

    Attributes:
        actions: what a rise of the loss or a fall of the captured energy triggers, of notice, recalibrate, boost.
        delta: chance of a false alarm that a detector is allowed; smaller is slower to notice.
        boost: by how much the learning rate is multiplied after a drift, where actions name boost.
        boost_steps: for so many steps.
        quiet_after: evaluations without a gain and without a drift after which training rests; 0 = never.
        quiet_interval_s: seconds between two looks at the loss of new samples while it rests.
        quiet_backlog: batches that may wait meanwhile; more end the rest.
    """

    actions: tuple[str, ...] = ("notice", "recalibrate")
    delta: float = 0.002
    boost: float = 3.0
    boost_steps: int = 50
    quiet_after: int = 0
    quiet_interval_s: float = 600.0
    quiet_backlog: int = 64

    def check(self) -> list[str]:
        """Return what is wrong with the settings, a sentence each."""
        wrong = []
        if unknown := [name for name in self.actions if name not in ACTIONS]:
            wrong.append(f"drift.actions names {choices(unknown)}; choose of: {choices(ACTIONS)}")
        if not 0 < self.delta < 1:
            wrong.append(f"drift.delta is {self.delta}; it is a probability, between 0 and 1")
        if not (math.isfinite(self.boost) and self.boost > 0):
            wrong.append(f"drift.boost is {self.boost}; it must be a finite number above 0")
        if not (math.isfinite(self.quiet_interval_s) and self.quiet_interval_s > 0):
            wrong.append(f"drift.quiet_interval_s is {self.quiet_interval_s}; it must be above 0")
        for name, least in (("boost_steps", 1), ("quiet_after", 0), ("quiet_backlog", 1)):
            if getattr(self, name) < least:
                wrong.append(f"drift.{name} is {getattr(self, name)}; it must be at least {least}")
        return wrong
