"""What the deaths of earlier workers ask of the plan: pure arithmetic on what the supervisor wrote down.

The supervisor adds one *lowering* to ``deaths.json`` in the state directory when the kernel killed the worker for want
of memory, or when it died several times without getting to a newer checkpoint, and notes what the plan needed under
which it died. A lowering takes a sixth of that. One is given back for every ``calm_steps`` steps trained since, so that
after a passing shortage the run returns to its full plan by itself; a new death on the way begins with what is then
still in force.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FILE = "deaths.json"
KEPT = 5 / 6
"""What one lowering leaves of the memory that a plan may need."""


@dataclass(frozen=True)
class Deaths:
    """``lowerings`` were in force at step ``at_step``; one ends with every ``calm_steps`` steps trained since.
    ``planned_bytes``: what the plan needed under which the last of these workers died; None: there was no plan yet."""

    lowerings: int = 0
    at_step: int = 0
    calm_steps: int = 1
    planned_bytes: int | None = None

    def in_force(self, step: int) -> int:
        """Return how many lowerings hold at ``step``."""
        return max(0, self.lowerings - max(0, step - self.at_step) // self.calm_steps)

    def ceiling_bytes(self, step: int, whole_bytes: int) -> int | None:
        """Return what a plan at ``step`` may need at most; None: the deaths ask for nothing (any more).

        The first lowering in force is one from the plan that died, and each that was given back raises the ceiling by
        as much.

        Args:
            whole_bytes: what the plan for all that the user allows needs; stands in where no plan was known.
        """
        left = self.in_force(step)
        if left == 0:
            return None
        if self.planned_bytes is None:
            return round(whole_bytes * KEPT**left)
        return round(self.planned_bytes * KEPT ** (left - self.lowerings + 1))


def read_deaths(state: Path) -> Deaths:
    """Return what the state directory holds of its supervisor's record; no file, or a damaged one: no lowering."""
    try:
        known = json.loads((state / FILE).read_text("utf-8"))
        planned = known["planned_bytes"]
        return Deaths(
            max(0, int(known["lowerings"])), int(known["at_step"]), max(1, int(known["calm_steps"])),
            None if planned is None else int(planned),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return Deaths()
