"""The settings of drift detection and of quiet periods. Knows nothing of how it is done."""

from __future__ import annotations

from dataclasses import dataclass

from edgetune.errors import choices

ACTIONS = ("notice", "recalibrate", "boost")


@dataclass(frozen=True)
class DriftConfig:
    """Settings of drift detection and of quiet periods.

    Attributes:
        actions: what a drift of the loss or of the captured energy triggers, of notice, recalibrate and boost.
        delta: confidence of the detector: the chance of a false alarm; smaller is slower to notice.
        boost: by how much the learning rate is multiplied after a drift, where actions name boost.
        boost_steps: for so many steps.
        quiet_after: evaluations without a gain and without a drift after which training rests; 0 = never.
        quiet_interval_s: seconds between two looks at the loss while it rests.
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
        for name in self.actions:
            if name not in ACTIONS:
                wrong.append(f"drift.actions names '{name}'; choose of: {choices(ACTIONS)}")
        if not 0 < self.delta < 1:
            wrong.append(f"drift.delta is {self.delta}; it must lie in (0, 1)")
        for name, value, least in (
            ("boost", self.boost, 0.0),
            ("boost_steps", self.boost_steps, 0),
            ("quiet_after", self.quiet_after, 0),
            ("quiet_interval_s", self.quiet_interval_s, 0.0),
            ("quiet_backlog", self.quiet_backlog, 1),
        ):
            if value < least:
                wrong.append(f"drift.{name} is {value}; it must be at least {least}")
        return wrong
