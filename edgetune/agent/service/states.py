"""The states in which an agent can be, and the one in which it is. Knows words; nothing of what leads to them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class State(str, Enum):
    """What an agent does.

    WAITING: for samples, or because there is nothing to learn. CALIBRATING: it loads, measures and plans. TRAINING: as
    asked. DEGRADED: it trains with less than was asked, or cannot store what it learns. PAUSED: it yields to something.
    FAILED: an error ended it.
    """

    WAITING = "waiting"
    CALIBRATING = "calibrating"
    TRAINING = "training"
    PAUSED = "paused"
    DEGRADED = "degraded"
    FAILED = "failed"


@dataclass(frozen=True)
class Standing:
    """A state, and why; an empty ``reason``: the state says all."""

    state: State
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.state.value}: {self.reason}" if self.reason else self.state.value
