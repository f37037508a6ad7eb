"""Holds a run to its effective budget: looks before every step, judges every measurement, answers what ran out.

The governor decides, the budgeter plans; this module asks the one, tells the other, and logs each change with its
reason. Knows both, and what an allowance is; nothing of sessions or samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from edgetune.agent.allowance import Allowance, AllowanceReader
from edgetune.agent.budget import Budgeter, Held, release_memory
from edgetune.agent.deaths import Deaths
from edgetune.agent.governor import Action, Condition, Governor, Reading, margin
from edgetune.agent.journal import Journal
from edgetune.agent.service.states import State
from edgetune.errors import BudgetError
from edgetune.planning.plan import Plan
from edgetune.planning.selection import described
from edgetune.units import format_bytes

UNLIMITED_BYTES = 1 << 60
LOWERED = 7 / 8
"""To what part of its memory a plan is lowered under which an allocation failed."""
FIRST_WAIT_SECONDS, MOST_WAIT_SECONDS = 1.0, 60.0
"""How long a run waits after the least plan ran out of memory; doubled each time."""


class Use(Protocol):
    """Logs a plan that came into force and hands it to whoever computes (``Work.use``)."""

    def __call__(self, plan: Plan, event: str, reason: str, **fields: Any) -> None: ...


class Enforcer:
    """Enforces the budget of one run.

    Args:
        use: puts a plan into force. save: makes what is trained permanent, before a wait.
        deaths: of earlier workers. step: tells the number of the last step.
        refusing: a budget of the user's that can never fit is an error, and not a reason to wait.
    """

    def __init__(
        self,
        budgeter: Budgeter,
        reader: AllowanceReader,
        journal: Journal,
        *,
        use: Use,
        save: Callable[[], None],
        refusing: bool,
        deaths: Deaths,
        step: Callable[[], int],
    ) -> None:
        self.budgeter, self.reader, self.journal = budgeter, reader, journal
        self.governor = Governor()
        self._use, self._save, self._refusing = use, save, refusing
        self._deaths, self._step = deaths, step
        self._whole_bytes = budgeter.need_bytes
        self.allowance = reader.read()
        self._measured_bytes = 0
        self._held: Held | None = None
        self._carefully: int | None = None
        self._wait_seconds, self._wait_until = FIRST_WAIT_SECONDS, 0.0

    @property
    def condition(self) -> Condition:
        """Whether the run goes as asked, with less, or waits."""
        return self.governor.condition

    @property
    def spare_bytes(self) -> int | None:
        """By how much the process may grow from what it had at the last look; None: nothing limits it."""
        return None if self.allowance.limit >= UNLIMITED_BYTES else self.allowance.limit - self.allowance.resident

    def look(self) -> bool:
        """Look at what there is and act on it; return whether a step may be made (not while nothing fits)."""
        now = self.allowance = self.reader.read()
        asked = self.budgeter.request.budget_bytes
        if now.asked != asked:
            self._ask(asked, now)
        if time.monotonic() < self._wait_until:
            return False
        if self.budgeter.limit_bytes == now.asked:
            self._whole_bytes = self.budgeter.need_bytes
        reading = Reading(
            now.limit, now.room, now.asked, self.budgeter.limit_bytes,
            max(self.budgeter.need_bytes, self._measured_bytes), self._whole_bytes,
        )  # fmt: skip
        decision = self.governor.look(reading)
        if decision.action is Action.DEGRADE:
            why = f"the plan needs {format_bytes(reading.need)}"
            self._degrade([decision.budget or now.limit, now.limit], why)
        elif decision.action is Action.RECOVER:
            self._recover_below_the_ceiling(decision.budget)
        elif decision.action is Action.RESUME:
            self._recover(self._carefully or decision.budget, "there is room again", "resumed")
        return self.condition is not Condition.PAUSED

    def measured(self, peak_bytes: int, *, resettable: bool) -> None:
        """Judge the measured peak of a step: correct the plan by the first one, lower it after an overrun.

        Raises:
            BudgetError: the user's budget can never hold, and nobody is there to change it.
        """
        self._measured_bytes, old = peak_bytes if resettable else 0, self.budgeter.plan
        if resettable and peak_bytes <= self.allowance.limit:
            self._held = self.budgeter.held()
        overrun = self.budgeter.overrun(peak_bytes, resettable=resettable)
        if not overrun and self.budgeter.corrected:
            return
        try:
            plan = self.budgeter.correct(peak_bytes)
        except BudgetError as error:
            if resettable and peak_bytes <= self.allowance.limit:
                self.budgeter.limit_bytes = self.allowance.limit  # nothing takes less, and there is room for it
                return
            held, told = self._held, f"measured {format_bytes(peak_bytes)}"
            if held is not None and held.plan != old and held.need_bytes <= self.allowance.limit:
                # What this plan took beyond its prediction need not be what that one takes: it was seen to fit.
                plan = self.budgeter.go_back(held)
                self._put(
                    old, plan, "degrade", f"{told}; back to what was measured within it", measured_peak_bytes=peak_bytes
                )
                release_memory()
                return
            self._refuse(error, told, measured_peak_bytes=peak_bytes)
            return
        self._measured_bytes = 0  # of a plan that is not in force any more
        if overrun:
            reason = f"measured {format_bytes(peak_bytes)} against a budget of {format_bytes(old.budget_bytes or 0)}"
            self._put(old, plan, "degrade", reason, measured_peak_bytes=peak_bytes)
            release_memory()
        else:
            reason = (
                f"predicted {format_bytes(old.predicted_peak_bytes)}, measured {format_bytes(peak_bytes)}: corrected "
                f"to {format_bytes(plan.predicted_peak_bytes)}"
            )
            self._use(plan, "planned", reason, measured_peak_bytes=peak_bytes)

    def measured_phase(self, phase: str, peak_bytes: int, *, resettable: bool, lowering: bool = True) -> None:
        """Judge the measured peak of a phase between steps: what is over the effective budget is logged, and with
        ``lowering`` answered by a plan that takes so much less."""
        excess_bytes = peak_bytes - self.allowance.limit
        if not resettable or excess_bytes <= 0 or self.condition is Condition.PAUSED:
            return
        why = f"{phase} took {format_bytes(peak_bytes)}, over the effective budget"
        self.journal.event(
            "overrun", f"{why} of {format_bytes(self.allowance.limit)}", step=self._step(), phase=phase,
            measured_peak_bytes=peak_bytes, **self.figures(),
        )  # fmt: skip
        if lowering:
            try:
                self._lower(min(self.budgeter.need_bytes, self.allowance.limit) - excess_bytes, why)
            except BudgetError:  # no plan takes less, and the steps are within the budget
                release_memory()

    def heed_deaths(self) -> None:
        """Lower the plan to what the deaths of earlier workers ask for; if nothing fits that, half way to the least.

        A plan that is lower already than the one that died stays: a restart for another reason changes nothing.
        """
        ceiling, predicted_bytes = self._ceiling(), self.budgeter.plan.predicted_peak_bytes
        died_bytes = self._deaths.planned_bytes
        if ceiling is None or self.budgeter.need_bytes <= ceiling or predicted_bytes < (died_bytes or 0):
            return
        self.governor.exhausted()
        text = "earlier workers were killed for want of memory"
        try:
            self._lower(ceiling, text)
        except BudgetError as error:
            if error.least_bytes < predicted_bytes:
                self._lower((error.least_bytes + predicted_bytes) // 2, text)

    def _ceiling(self) -> int | None:
        return self._deaths.ceiling_bytes(self._step(), self._whole_bytes)

    def exhausted(self, text: str) -> None:
        """Answer an allocation that failed: a lower plan; the least one having failed too, wait, each time longer."""
        self.governor.exhausted()
        need = min(self.budgeter.need_bytes, self.allowance.limit)
        try:
            self._lower(int(need * LOWERED), text)
        except BudgetError as error:
            if error.least_bytes < need:
                self._lower(error.least_bytes, text)
                return
            self._carefully = error.least_bytes
            self._wait_until = time.monotonic() + self._wait_seconds
            self._wait_seconds = min(2 * self._wait_seconds, MOST_WAIT_SECONDS)
            self._pause(error.least_bytes, f"{text}; no plan takes less")

    def adopted(self) -> None:
        """Note that the budgeter took up a stored plan."""
        self.governor.planned(whole=self.budgeter.limit_bytes == self.budgeter.request.budget_bytes)

    def refused(self, error: BudgetError) -> None:
        """Answer that nothing fits: raise it where only the user can help and is not there; else wait."""
        self._refuse(error, str(self.allowance))

    def went_well(self) -> None:
        """Note that a step was made: what failed before does not make the next wait longer."""
        self._wait_seconds, self._carefully = FIRST_WAIT_SECONDS, None

    def figures(self) -> dict[str, Any]:
        """Return what the run log says of the allowance."""
        now = self.allowance
        return {
            "condition": self.condition.value, "asked_bytes": now.asked, "resident_bytes": now.resident,
            "available_bytes": now.available, "available_source": now.source, "left_to_others_bytes": now.reserve,
            "effective_budget_bytes": now.limit,
        }  # fmt: skip

    def _ask(self, before: int | None, now: Allowance) -> None:
        """Follow a budget that the user changed, at once."""
        old, new = ("none" if size is None else format_bytes(size) for size in (before, now.asked))
        text = f"the budget was changed from {old} to {new}"
        self.journal.event("budget", text, step=self._step(), **self.figures())
        self.budgeter.ask(now.asked)
        self.governor.asked_anew()
        if self.condition is Condition.PAUSED:
            return
        targets = [now.limit] if now.limit == now.asked else [now.limit - margin(now.limit), now.limit]
        planned = self.budgeter.limit_bytes
        if now.asked is None and self._whole_bytes <= now.limit:
            self._recover(None, "the budget was taken away", "recover")
        elif planned is not None and planned < targets[0]:
            self._recover(targets[0], "the budget was raised", "recover")
        elif planned is None or planned > now.limit:
            self._degrade(targets, "the budget was lowered")

    def _degrade(self, targets: list[int], why: str, **fields: Any) -> None:
        """Plan for the first of ``targets`` that any plan fits; where none does, wait."""
        old, error = self.budgeter.plan, None
        for target in targets:
            try:
                plan = self.budgeter.within(max(1, target), self._measured_bytes)
            except BudgetError as refused:
                error = refused
            else:
                self._put(old, plan, "degrade", f"{why}; {self.allowance}", **fields)
                release_memory()
                return
        assert error is not None
        self._refuse(error, f"{why}; {self.allowance}", **fields)

    def _lower(self, target: int, text: str) -> None:
        old, plan = self.budgeter.plan, self.budgeter.within(max(1, target), self._measured_bytes)
        self._put(old, plan, "degrade", text)
        release_memory()

    def _recover_below_the_ceiling(self, target: int | None) -> None:
        ceiling, planned = self._ceiling(), self.budgeter.limit_bytes
        if ceiling is not None and (target is None or ceiling < target):
            target = ceiling
        if target is None or planned is None or target > planned:
            self._recover(target, f"room for {self.governor.patience} steps", "recover")

    def _recover(self, target: int | None, why: str, event: str) -> None:
        old = self.budgeter.plan
        try:
            plan = self.budgeter.within(target, self._measured_bytes)
        except BudgetError as error:  # only after a wait: what fitted before fits where there is more
            self._pause(error.least_bytes, f"{why}; {self.allowance}")
            return
        self._put(old, plan, event, f"{why}; {self.allowance}")

    def _put(self, old: Plan, plan: Plan, event: str, reason: str, **fields: Any) -> None:
        """Put ``plan`` into force, with the reason and what it changes."""
        self._measured_bytes = 0
        self.governor.planned(whole=self.budgeter.limit_bytes == self.budgeter.request.budget_bytes)
        change = f"{_kept(old)} -> {_kept(plan)}"
        fields |= {"change": change, **self.figures()}
        self._use(plan, event, f"{reason}: {change}", **fields)

    def _refuse(self, error: BudgetError, why: str, **fields: Any) -> None:
        """Nothing fits: an error where only the user can help and is not there, else a reason to wait."""
        asked = self.budgeter.request.budget_bytes
        if self._refusing and asked is not None and asked < error.least_bytes:
            raise error
        self._pause(error.least_bytes, f"{why}; {error}", **fields)

    def _pause(self, least_bytes: int, reason: str, **fields: Any) -> None:
        self.governor.paused(least_bytes)
        text = f"paused: {reason}; training waits for {format_bytes(least_bytes)} ({least_bytes} bytes)"
        fields |= self.figures()
        self.journal.event("paused", text, step=self._step(), reason=reason, least_bytes=least_bytes, **fields)
        self._save()
        self.journal.enter(State.PAUSED, f"memory: {reason}")
        release_memory()


def _kept(plan: Plan) -> str:
    """Return what a plan takes and keeps, for people."""
    kept = [described(plan.selection) if plan.epsilon is None else f"ε {plan.epsilon:.4f}"]
    kept.append(f"micro-batch {plan.micro_batch}")
    if plan.tail_micro_batch < plan.batch:
        kept.append(f"trained {plan.tail_micro_batch} at a time")
    kept.append(f"last {plan.trained}")
    if plan.cache_bytes:
        kept.append(f"cache {format_bytes(plan.cache_bytes)}")
    return f"{format_bytes(plan.predicted_peak_bytes)} ({', '.join(kept)})"
