"""Decides when a plan must give way to less memory, and when there is room for a better one again. Pure numbers.

Knows no planner, session, file or clock: between two steps it is told what there is, and answers with what to plan for.
Laws, which hold for every sequence of readings:

1. Whatever takes more than the limit is answered in the same look: no plan is kept that needs more than there is.
2. A better plan comes only after ``patience`` looks in a row that had room for it, and room by more than ``gain``;
   what it is made for was there in every one of those looks.
3. If it has to give way again soon, the patience doubles: memory that comes and goes cannot make the plan flap.
4. While paused nothing runs; it goes on after a few looks in a row with room for the least plan known to fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from edgetune.units import MIB

PATIENCE = 20
MOST_PATIENCE = 1280
RESUME_PATIENCE = 3
SETTLED = 8  # patiences without a setback, after which the patience is the first one again


class Condition(Enum):
    """How a run stands: as asked, with less than was asked, or waiting for memory."""

    RUNNING = "running"
    DEGRADED = "degraded"
    PAUSED = "paused"


class Action(Enum):
    """What to do before the next step."""

    KEEP = "keep"
    DEGRADE = "degrade"
    RECOVER = "recover"
    RESUME = "resume"


@dataclass(frozen=True)
class Reading:
    """What is known between two steps, in bytes.

    Attributes:
        limit: the effective budget: what the user said, or what there is, whichever is less.
        room: what there is for this process, whatever the user said.
        asked: what the user said; None: nothing.
        planned: the budget that the plan in force was made for; None: as if there were no limit.
        need: what the plan in force takes, and what is to stay free of a budget.
        whole: the same of the plan that was made for what was asked.
    """

    limit: int
    room: int
    asked: int | None
    planned: int | None
    need: int
    whole: int


@dataclass(frozen=True)
class Decision:
    """What to do; ``budget`` is what to plan for, in bytes (None: no limit)."""

    action: Action
    budget: int | None = None


def gain(planned: int) -> int:
    """Return by how many bytes there must be more than ``planned`` before a better plan is worth its making."""
    return max(2 * MIB, planned // 20)


def margin(limit: int) -> int:
    """Return what stays free of a limit that others set: it moves."""
    return max(MIB, limit // 50)


class Governor:
    """Watches one run. ``look`` is called between two steps; ``degraded``, ``paused`` and so on say what came of it."""

    def __init__(self) -> None:
        self.condition = Condition.RUNNING
        self.patience = PATIENCE
        self.least = 0
        self._streak, self._lowest, self._since_recovery = 0, 0, MOST_PATIENCE * SETTLED

    def look(self, now: Reading) -> Decision:
        """Return what to do before the next step."""
        if self.condition is Condition.PAUSED:
            return self._waiting(now)
        self._since_recovery += 1
        if self._since_recovery == self.patience * SETTLED:
            self.patience = PATIENCE
        if now.need > now.limit:
            self._setback()
            bound = now.asked is None or now.limit < now.asked
            return Decision(Action.DEGRADE, max(1, now.limit - margin(now.limit)) if bound else now.limit)
        if now.planned is None or now.planned == now.asked or now.room < now.planned + gain(now.planned):
            self._streak = 0
            return Decision(Action.KEEP)
        if now.limit <= now.planned:  # there is room, but the user does not want it taken
            self._streak = 0
            return Decision(Action.KEEP)
        self._lowest = now.limit if not self._streak else min(self._lowest, now.limit)
        self._streak += 1
        if self._streak < self.patience:
            return Decision(Action.KEEP)
        self._streak, self._since_recovery = 0, 0
        return Decision(Action.RECOVER, now.asked if self._lowest >= now.whole else self._lowest)

    def exhausted(self) -> None:
        """Note that an allocation failed although the plan was within the limit."""
        self._setback()

    def planned(self, *, whole: bool) -> None:
        """Note that a plan came into force; ``whole``: the one that was asked for."""
        self.condition = Condition.RUNNING if whole else Condition.DEGRADED

    def paused(self, least: int) -> None:
        """Note that nothing fits, and that the ``least`` budget that would is so many bytes."""
        self.condition, self.least, self._streak = Condition.PAUSED, least, 0

    def asked_anew(self) -> None:
        """Note that the user said something else: what was learned of the old wish does not hold."""
        self._streak, self.patience = 0, PATIENCE

    def _waiting(self, now: Reading) -> Decision:
        spare = 0 if now.asked is not None and now.limit == now.asked else margin(self.least)
        if now.limit < self.least + spare:
            self._streak = 0
            return Decision(Action.KEEP)
        self._lowest = now.limit if not self._streak else min(self._lowest, now.limit)
        self._streak += 1
        if self._streak < RESUME_PATIENCE:
            return Decision(Action.KEEP)
        self._streak = 0
        return Decision(Action.RESUME, now.asked if self._lowest >= now.whole else self._lowest)

    def _setback(self) -> None:
        if self._since_recovery < self.patience * SETTLED:
            self.patience = min(2 * self.patience, MOST_PATIENCE)
        self._streak, self._since_recovery = 0, MOST_PATIENCE * SETTLED
