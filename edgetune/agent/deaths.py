"""What the deaths of earlier workers ask of the plan: pure arithmetic on what the supervisor wrote down.

The supervisor adds one *lowering* to ``deaths.json`` in the state directory when the kernel killed the worker for want
of memory, or when it died several times without getting to a newer checkpoint. Each takes a sixth of what the process
may take. One is given back for every ``calm_steps`` steps trained since, so that after a passing shortage the run
returns to its full plan by itself; a new death on the way begins with what is then still in force.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FILE = "deaths.json"
KEPT_OF_BUDGET = 5 / 6
"""What one lowering leaves of the memory that a plan may take."""


@dataclass(frozen=True)
class Deaths:
    """``lowerings`` were in force at step ``at_step``; one ends with every ``calm_steps`` steps trained since."""

    lowerings: int = 0
    at_step: int = 0
    calm_steps: int = 1

    def in_force(self, step: int) -> int:
        """Return how many lowerings hold at ``step``."""
        return max(0, self.lowerings - max(0, step - self.at_step) // self.calm_steps)

    def lowered_reserve_bytes(self, step: int, base_bytes: int) -> int:
        """Return what a plan at ``step`` must leave free of ``base_bytes`` besides its usual reserve.

        Args:
            base_bytes: what the process might take: the budget, or without one the peak of the last plan.
        """
        return base_bytes - round(base_bytes * KEPT_OF_BUDGET ** self.in_force(step))


def read_deaths(state: Path) -> Deaths:
    """Return what the state directory holds of its supervisor's record; no file, or a damaged one: no lowering."""
    try:
        known = json.loads((state / FILE).read_text("utf-8"))
        return Deaths(max(0, int(known["lowerings"])), int(known["at_step"]), max(1, int(known["calm_steps"])))
    except (OSError, ValueError, KeyError, TypeError):
        return Deaths()
