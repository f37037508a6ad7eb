"""Keeps the run inside its budget: makes plans, corrects them by what was measured, lowers them when they overrun.

Knows the planner; nothing of sessions, files or how memory is measured.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgetune.bundle import Manifest
from edgetune.engines import heap
from edgetune.errors import BudgetError
from edgetune.planning.candidates import Limits
from edgetune.planning.curve import ITERATION
from edgetune.planning.knobs import layers_before_head
from edgetune.planning.plan import Plan, make_plan
from edgetune.planning.prediction import predict
from edgetune.planning.rates import LEVELS, comparable, ranked
from edgetune.planning.rebase import rebased, settled_for, suffices
from edgetune.planning.selection import described
from edgetune.planning.spectra import Calibration, identity_calibration
from edgetune.planning.uniform import labels_of

PER_LAYER = "per-layer"

ALWAYS_THERE = ("runtime", "weights", "parameters", "optimizer", "bases")
"""The lines of a plan's ledger that are resident in every phase."""


@dataclass(frozen=True)
class PlanRequest:
    """What the user asked of the plan. Stored with a checkpoint: a plan is kept only while the request is the same."""

    batch: int
    budget_bytes: int | None
    activation_budget_bytes: int | None
    epsilon: float | None
    allocation: str = "uniform"
    codec: str | None = None
    micro_batch: int | None = None
    tail_micro_batch: int | None = None
    trained: int | None = None
    cache_bytes: int | None = None
    memory: str = "lean"


@dataclass(frozen=True)
class Held:
    """A plan with the limit and the reserve for which it was made, and whether a given ε had to yield to them."""

    plan: Plan
    limit_bytes: int | None
    reserve_bytes: int
    yielded: bool

    @property
    def need_bytes(self) -> int:
        """What it takes at its peak, and what is to stay free of a budget."""
        return self.plan.predicted_peak_bytes + self.reserve_bytes


class Budgeter:
    """Holds the plan in force.

    Args:
        runtime_bytes: what the process takes before anything of the plan is allocated.
        reserve_bytes: what a plan leaves free of the budget.

    Raises:
        BudgetError: no plan fits the request (from every method that plans).
    """

    def __init__(self, manifest: Manifest, request: PlanRequest, runtime_bytes: int, reserve_bytes: int = 0) -> None:
        self.manifest, self.request, self.runtime_bytes = manifest, request, runtime_bytes
        self.corrected = False
        self.limit_bytes = request.budget_bytes
        self._most_measured_bytes = 0
        self._reserve_bytes = self._first_reserve_bytes = reserve_bytes
        # Before any calibration an ε says nothing of ranks; whether it fits is seen afterwards.
        limited = request.budget_bytes is not None or request.activation_budget_bytes is not None
        self._yielded = False
        self.plan = self._make(None, 0, None if limited else request.epsilon)

    @property
    def need_bytes(self) -> int:
        """What the plan in force takes at its peak, and what is to stay free of a budget."""
        return self.plan.predicted_peak_bytes + self._reserve_bytes

    def within(self, limit_bytes: int | None, measured_bytes: int = 0) -> Plan:
        """Plan anew for another limit (None: none), with the correction known so far, and what the plan in force was
        measured to take beyond its prediction: a correction that was learned of one plan may be too small for another.

        A given ε that does not fit yields; where nothing fits with the whole reserve, half of it is given up.

        Raises:
            BudgetError: nothing fits; plan and limit are as before.
        """
        before = self.limit_bytes, self._yielded, self._reserve_bytes
        self.limit_bytes, error = limit_bytes, None
        correction_bytes = self.plan.correction_bytes + max(0, measured_bytes - self.plan.predicted_peak_bytes)
        for yielded, reserve_bytes in self._concessions():
            self._yielded, self._reserve_bytes = yielded, reserve_bytes
            try:
                self.plan = self._make(self.plan.calibration, correction_bytes, self._epsilon())
                return self.plan
            except BudgetError as refused:
                error = refused
        self.limit_bytes, self._yielded, self._reserve_bytes = before
        assert error is not None
        raise error

    def _concessions(self) -> list[tuple[bool, int]]:
        """Return what may be given up for a limit, the least first: (whether a given ε is, the reserve).

        Half of the reserve stays: without any, every other step would be over its limit by some pages. One that was
        given up after a measurement may be given up again.
        """
        given = [False, True] if self.request.epsilon is not None else [False]
        most = max(self._first_reserve_bytes, self._reserve_bytes)
        reserves = sorted({most, most // 2, min(self._reserve_bytes, most // 2)}, reverse=True)
        return [(yielded, reserve_bytes) for reserve_bytes in reserves for yielded in given]

    def held(self) -> Held:
        """Return the plan in force and what it was made for, to which :meth:`go_back` leads."""
        return Held(self.plan, self.limit_bytes, self._reserve_bytes, self._yielded)

    def go_back(self, held: Held) -> Plan:
        """Put an earlier plan into force again, as it was."""
        self.plan, self.limit_bytes = held.plan, held.limit_bytes
        self._reserve_bytes, self._yielded = held.reserve_bytes, held.yielded
        return self.plan

    def ask(self, budget_bytes: int | None) -> None:
        """Note what the user asks for now; :meth:`within` plans for it."""
        self.request = dataclasses.replace(self.request, budget_bytes=budget_bytes)

    def replan(self, calibration: Calibration | None) -> Plan:
        """Plan anew for a new calibration, with the correction known so far; return the plan in force."""
        self.plan = self._make(calibration, self.plan.correction_bytes, self._epsilon())
        return self.plan

    def refresh(self, calibration: Calibration) -> Plan:
        """Take the bases of newer data; where the ranks in force no longer keep the plan's ε of it, plan anew.

        A given ε that no longer fits the budget yields to it. Raises no BudgetError: the old ranks fit as before.
        """
        old = self.plan.calibration
        if old is not None and old.errors and not calibration.errors:
            # Of ε, not of ranks: the ranks that an ε needs are those of the newer data.
            calibration = dataclasses.replace(calibration, errors=old.errors)
        kept = rebased(self.manifest, self.plan, calibration)
        if suffices(self.manifest, self.plan, calibration):
            self.plan = kept
            return kept
        try:
            return self.replan(calibration)
        except BudgetError:
            self._yielded = self.request.epsilon is not None
        try:
            return self.replan(calibration)
        except BudgetError:  # the budget is kept by a narrow margin that no new plan may use; this one needs no more
            self.plan = kept
            return kept

    def settle(self, resident_bytes: int) -> Plan | None:
        """Plan anew if more is resident between two phases than the lines that are always there; else return None.

        Without a budget there is nothing to protect, and nothing is done.
        """
        ledger = self.plan.ledger
        excess_bytes = resident_bytes - sum(ledger.get(line, 0) for line in ALWAYS_THERE)
        if self.limit_bytes is None or excess_bytes <= self.plan.correction_bytes:
            return None
        try:
            self.plan = self._make(self.plan.calibration, excess_bytes, self._epsilon())
        except BudgetError:
            if self._epsilon() is None:
                raise
            self._yielded = True  # the budget wins over a given ε
            self.plan = self._make(self.plan.calibration, excess_bytes, None)
        return self.plan

    def adopt(self, plan: Plan, calibration: Calibration | None, *, corrected: bool) -> Plan:
        """Put a stored plan in force; without a calibration its bases are the unit ones, as when it was made."""
        if calibration is None and plan.ranks:
            calibration = identity_calibration(self.manifest, self.request.batch)
        self.plan = dataclasses.replace(plan, calibration=calibration)
        self.corrected, self.limit_bytes = corrected, plan.budget_bytes
        asked = self.request.epsilon
        self._yielded = asked is not None and plan.epsilon is not None and plan.epsilon != asked
        return self.plan

    def overrun(self, measured_bytes: int, *, resettable: bool) -> bool:
        """Return whether a step's measured peak is over the budget, or has used most of what was to stay free of it.

        Args:
            resettable: whether the meter starts anew for each step; where not, only a peak higher than all before
                says anything of this step.
        """
        higher = measured_bytes > self._most_measured_bytes
        self._most_measured_bytes = max(self._most_measured_bytes, measured_bytes)
        budget = self.limit_bytes
        return budget is not None and measured_bytes > budget - self._reserve_bytes // 3 and (resettable or higher)

    def correct(self, measured_bytes: int) -> Plan:
        """Plan anew with the difference between a step's measured and predicted peak, of either sign.

        With a given epsilon that no longer fits the budget, the budget wins: the largest epsilon that fits is taken.
        """
        correction, old = measured_bytes - self._step_peak_bytes(), self.plan
        if self.corrected and self.limit_bytes is not None:
            # The reserve was not enough; what exceeded it may come again.
            self._reserve_bytes += max(0, measured_bytes - self.limit_bytes)
        budget_bytes = self.limit_bytes
        if budget_bytes is not None and measured_bytes + self._reserve_bytes > budget_bytes:
            self._yielded = self.request.epsilon is not None
            if not self.plan.ranks and measured_bytes <= budget_bytes:
                self._reserve_bytes = 0  # a lossless codec has nothing to give, and the budget is kept without it
        self.corrected = True
        try:
            self.plan = self._make(self.plan.calibration, correction, self._epsilon())
        except BudgetError:
            if budget_bytes is None or measured_bytes > budget_bytes:
                raise
            self._reserve_bytes = 0  # nothing takes less, and the budget is kept without it
            self.plan = self._make(self.plan.calibration, correction, self._epsilon())
        if correction < 0 and (self.plan.trained, self.plan.tail_micro_batch) != (old.trained, old.tail_micro_batch):
            # That a step took less than predicted says nothing of one with other layers, or in other pieces.
            self.plan = self._make(self.plan.calibration, 0, self._epsilon())
        return self.plan

    def limits(self, samples: int, held_bytes: int, resident_bytes: int | None) -> Limits:
        """Return the limits of a measurement on ``samples`` at once.

        Args:
            held_bytes: what is held besides what a training step holds.
            resident_bytes: what the process holds now; None: not known.
        """
        excess_bytes = 0
        if resident_bytes is not None:
            excess_bytes = resident_bytes - sum(self.plan.ledger.get(line, 0) for line in ALWAYS_THERE)
        request = self.request
        return Limits(
            samples, self.runtime_bytes, self.limit_bytes, request.activation_budget_bytes,
            max(0, self.plan.correction_bytes, excess_bytes) + held_bytes, self._reserve_bytes,
        )  # fmt: skip

    def _step_peak_bytes(self) -> int:
        """Return the uncorrected prediction for the graphs that a step runs: the plan's peak may be at calibration."""
        plan = self.plan
        prediction = predict(
            settled_for(self.manifest, plan),
            batch=plan.batch, micro_batch=plan.micro_batch, ranks=plan.ranks, runtime_bytes=self.runtime_bytes,
            tail_micro_batch=plan.tail_micro_batch, cache_bytes=plan.cache_bytes, memory=plan.memory,
        )  # fmt: skip
        most = max((prediction.peaks[name].bytes for name in ITERATION if name in prediction.peaks), default=0)
        return sum(prediction.ledger[line] for line in ALWAYS_THERE) + most

    def _epsilon(self) -> float | None:
        return None if self._yielded else self.request.epsilon

    def _make(self, calibration: Calibration | None, correction_bytes: int, epsilon: float | None) -> Plan:
        request = self.request

        def make(manifest: Manifest, known: Calibration | None, **how: Any) -> Plan:
            return make_plan(
                manifest,
                batch=request.batch,
                calibration=known,
                budget_bytes=self.limit_bytes,
                activation_budget_bytes=request.activation_budget_bytes,
                runtime_bytes=self.runtime_bytes,
                correction_bytes=correction_bytes,
                reserve_bytes=self._reserve_bytes,
                micro_batch=request.micro_batch,
                tail_micro_batch=request.tail_micro_batch,
                cache_bytes=request.cache_bytes,
                memory=request.memory,
                **{"trained": request.trained, **how},
            )

        if request.allocation != PER_LAYER:
            return make(self.manifest, calibration, epsilon=epsilon, codec=request.codec)
        if (calibration is not None and calibration.errors) or not any(spec.lossy for spec in self.manifest.saved):
            return make(comparable(self.manifest, calibration), calibration, allocation=PER_LAYER)
        # Nothing tells codecs apart yet: one for all, a lossless one if any of those fits, else the first that does. A
        # lossy one rather than fewer layers: what is not trained cannot be compared either.
        lossy = {option.label for spec in self.manifest.saved for option in spec.options if option.lossy}
        labels = sorted(labels_of(self.manifest), key=lambda label: label in lossy)
        guessed = _guessed(self.manifest, calibration, request.batch)
        ways = [(calibration, {"codec": label}) for label in labels] + [(guessed, {"allocation": PER_LAYER})]
        counts = [layers_before_head(self.manifest), None] if request.trained is None else [request.trained]
        for trained, (known, how) in itertools.product(counts, ways):
            try:
                return make(self.manifest, known, trained=trained, **how)
            except BudgetError as error:
                refused = error
        raise refused


def _guessed(manifest: Manifest, calibration: Calibration | None, batch: int) -> Calibration:
    """Return a calibration with the errors of the tensors themselves, √(1 - ε), for those of the gradients; of options
    without an ε nothing is known but that they lose no more than all."""
    known = identity_calibration(manifest, batch) if calibration is None else calibration
    levels = np.array(LEVELS)
    table, all_lost = np.column_stack([levels, np.sqrt(1 - levels)]), np.ones((1, 2))
    errors = {
        spec.name: {option.label: table if ranked(option) else all_lost for option in spec.options if option.lossy}
        for spec in manifest.saved
    }
    return dataclasses.replace(known, errors=errors)


def summary(plan: Plan) -> dict[str, Any]:
    """Return what the run log and the status say of a plan."""
    return {
        "allocation": plan.allocation,
        "codecs": described(plan.selection),
        "selection": dict(plan.selection),
        "error": plan.error,
        "epsilon": plan.epsilon,
        "ranks": {name: dict(modes) for name, modes in plan.ranks.items()},
        "batch": plan.batch,
        "micro_batch": plan.micro_batch,
        "tail_micro_batch": plan.tail_micro_batch,
        "trained": plan.trained,
        "cache_bytes": plan.cache_bytes,
        "memory": plan.memory,
        "why": list(plan.reasons),
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "budget_bytes": plan.budget_bytes,
        "saved_bytes": plan.saved_bytes,
        "dense_saved_bytes": plan.dense_saved_bytes,
        "correction_bytes": plan.correction_bytes,
        "bottleneck": plan.bottleneck,
    }


def same_shape(one: Plan, other: Plan) -> bool:
    """Return whether two plans differ in nothing that a session would notice."""
    return (
        one.ranks == other.ranks
        and one.selection == other.selection
        and one.calibration is other.calibration
        and (one.batch, one.micro_batch, one.tail_micro_batch)
        == (other.batch, other.micro_batch, other.tail_micro_batch)
        and (one.trained, one.cache_bytes, one.memory) == (other.trained, other.cache_bytes, other.memory)
    )


def release_memory() -> None:
    """Give freed memory back to the system, where the C library can, so that the next peak does not include it."""
    gc.collect()
    heap.trim()
