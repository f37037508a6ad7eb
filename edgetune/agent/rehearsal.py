"""A step before the first one: measured, and undone. So the plan is corrected before anything is trained.

It is a real step on the batch that comes next (trunk, train, update), because only that has a real step's peak; a copy
of the state would not fit beside it, so it is undone from the checkpoint on the disk, which holds the very bits.
Knows a run's work; nothing of its loop.
"""

from __future__ import annotations

import time

from edgetune.agent.budget import same_shape
from edgetune.agent.feeder import Fed
from edgetune.agent.work import Work
from edgetune.errors import MemoryExhaustedError, StateError

MOST_REHEARSALS = 4
"""Each time with the plan that the one before led to, until one is within the budget."""
STEPS = 2


def rehearse(work: Work) -> None:
    """Measure a step that is not trained, and correct the plan by it, until a step is within what there is.

    Nothing is done where no checkpoint could undo it (the first trained step then corrects the plan), or where there
    is no full batch to measure.

    Raises:
        BudgetError: as ``Enforcer.measured``.
    """
    for _ in range(MOST_REHEARSALS):
        rows = work.supply.preview(work.batch)
        if len(rows) < work.batch or work.keeper.saved_step != work.step:
            return
        started, plan = time.perf_counter(), work.budgeter.plan
        try:
            peak_bytes = _measure(work)
        except MemoryExhaustedError as error:
            text = str(error)
        else:
            text = ""
        _undo(work)
        if text:
            work.journal.event("exhausted", f"the rehearsal: {text}", step=work.step, reason=text, applied=False)
            work.enforcer.exhausted("the rehearsal of a step ran out of memory")
            return
        work.journal.event(
            "rehearsed", step=work.step, predicted_peak_bytes=plan.predicted_peak_bytes,
            measured_peak_bytes=peak_bytes, effective_budget_bytes=work.enforcer.allowance.limit,
            seconds={"rehearse": round(time.perf_counter() - started, 6)},
        )  # fmt: skip
        work.tell_timeline(plan)
        work.enforcer.measured(peak_bytes, resettable=work.parts.meter.resettable is not False)
        if same_shape(work.budgeter.plan, plan):
            return


def _measure(work: Work) -> int:
    """Make steps on the samples that come next, which stay to be trained; return their peak.

    Two, because the first finds the memory as planning left it: what an engine keeps from step to step (the torch
    engine's arena) and the pages that its heap touches again are there from the second on, and in all that follow.
    """
    work.begin_measuring()
    for _ in range(STEPS):
        rows, fed = iter(work.supply.preview(work.batch)), Fed()
        work.make_step(lambda rows=rows: next(rows, None), fed)  # type: ignore[misc]
    return work.feeder.peak_bytes(work.parts.meter)


def _undo(work: Work) -> None:
    found = work.keeper.newest()
    if found is None or found.step != work.step:
        raise StateError(f"the checkpoint of step {work.step} is gone; it is needed to undo a rehearsal; run again")
    work.session.load_state(found.tensors)
