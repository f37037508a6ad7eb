"""One step of a run: feed, train, look at what it took and what it captured, and write it down.

Knows a run's work; nothing of the loop around it.
"""

from __future__ import annotations

import math
import time

from edgetune.agent.beginning import go_back
from edgetune.agent.budget import release_memory
from edgetune.agent.feeder import Fed
from edgetune.agent.work import Work
from edgetune.errors import DataError
from edgetune.planning.plan import Plan
from edgetune.planning.selection import described
from edgetune.units import format_bytes

MOST_BAD_BATCHES = 5


def train_step(work: Work) -> bool:
    """Train on the next batch; return whether a step was made (not if the batch was bad)."""
    if work.refresher.due:
        _refresh(work)
    started = time.perf_counter()
    meter, plan, epoch = work.parts.meter, work.budgeter.plan, work.supply.epoch
    meter.reset()
    passes: dict[int, int] = {}
    fed = work.feeder.feed(work.supply.taker(passes), work.batch, work.session, plan.micro_batch)
    work.supply.quarantine(fed.bad)
    if not fed.samples:
        return False
    began = time.perf_counter()
    # Handed over in a list, which the session empties: the features are not in memory during the backward pass.
    features, fed.features = list(fed.features), ()
    work.session.step_features(features, fed.labels)
    report, train_seconds = work.session.report, time.perf_counter() - began
    if not (math.isfinite(report.loss) and math.isfinite(report.gradient_norm)):
        _recover(work, fed, "loss" if not math.isfinite(report.loss) else "gradient")
        return False
    measured_bytes = meter.peak_bytes()
    work.step += 1
    work.supply.trained(fed.samples, passes, work.step)
    seconds = {"train": train_seconds, **fed.seconds}
    if "train" in report.seconds:  # the session tells its phases apart
        seconds.update(report.seconds)
    accuracy = report.correct / max(report.samples, 1)
    work.journal.event(
        "step", step=work.step, epoch=epoch, loss=report.loss, accuracy=accuracy, epsilon=plan.epsilon,
        ranks=dict(plan.ranks), energy=dict(report.energy), predicted_peak_bytes=plan.predicted_peak_bytes,
        measured_peak_bytes=measured_bytes, budget_bytes=plan.budget_bytes, samples=len(fed.samples),
        seconds={name: round(value, 6) for name, value in seconds.items()},
    )  # fmt: skip
    energy = {name: float(value) for name, value in report.energy.items() if math.isfinite(value)}
    _check_memory(work, measured_bytes, resettable=meter.resettable is not False)
    if len(fed.samples) == work.batch:  # a shorter one says less, and its batch rank is nearly full
        work.refresher.observe(work.step, energy, work.budgeter.plan)
    taken_seconds = time.perf_counter() - started
    work.mean_seconds += (taken_seconds - work.mean_seconds) * (0.1 if work.mean_seconds else 1.0)
    work.now.epoch, work.now.loss, work.now.accuracy = epoch, report.loss, accuracy
    work.now.measured_peak_bytes = measured_bytes
    work.now.energy = sum(energy.values()) / len(energy) if energy else None
    work.show()
    return True


def _check_memory(work: Work, measured_bytes: int, *, resettable: bool) -> None:
    """Lower the plan after an overrun; correct its prediction after the first step."""
    old = work.budgeter.plan
    if work.budgeter.overrun(measured_bytes, resettable=resettable):
        plan = work.budgeter.correct(measured_bytes)
        reason = (
            f"measured {format_bytes(measured_bytes)} against a budget of {format_bytes(old.budget_bytes or 0)}: "
            f"{_kept(old)} -> {_kept(plan)}, micro-batch {old.micro_batch} -> {plan.micro_batch}"
        )
        work.use(plan, "degrade", reason, measured_peak_bytes=measured_bytes)
        release_memory()
    elif not work.budgeter.corrected:
        plan = work.budgeter.correct(measured_bytes)
        work.use(plan, "planned", "corrected by the first measured step", measured_peak_bytes=measured_bytes)
    if (work.budgeter.plan.ranks, work.budgeter.plan.selection) != (old.ranks, old.selection):
        work.refresher.restart(work.budgeter.plan)


def _refresh(work: Work) -> None:
    """Measure new bases on the batches that come next: the one in which they fell may hold old and new data."""
    if len(work.supply.preview(work.batch)) < work.batch:
        return  # too little data to tell
    features = work.next_features(work.refresher.batches(work.batch, work.config.calibration_batches))
    calibration = work.refresher.measure(work.step, work.session, work.parts.meter, features)
    if calibration is None:
        return
    old, plan = work.budgeter.plan, work.budgeter.refresh(calibration)
    work.keeper.set_calibration(work.step, plan.calibration)
    reason, figures = work.refresher.refreshed(old, plan)
    work.use(plan, "refresh", reason, **figures)
    release_memory()


def _recover(work: Work, fed: Fed, what: str) -> None:
    """Forget a step that was not finite, go back to the last checkpoint, and never train its batch again."""
    reason = f"the {what} was not finite at step {work.step + 1}"
    work.supply.quarantine(((sample, reason) for sample in fed.samples), work.step + 1)
    go_back(work)
    work.bad_batches += 1
    if work.bad_batches >= MOST_BAD_BATCHES:
        raise DataError(
            f"{MOST_BAD_BATCHES} batches without a checkpoint in between gave a loss that is not finite; the "
            "learning rate is likely too high: lower --learning-rate and run again (the last checkpoint is intact)"
        )


def _kept(plan: Plan) -> str:
    return described(plan.selection) if plan.epsilon is None else f"ε {plan.epsilon}"
