"""One step of a run: feed, train, look at what it took and what it captured, and write it down.

Knows a run's work; nothing of the loop around it.
"""

from __future__ import annotations

import json
import math
import time

from edgetune.agent.beginning import go_back
from edgetune.agent.budget import release_memory
from edgetune.agent.culprits import culprits
from edgetune.agent.feeder import Fed
from edgetune.agent.service.states import State
from edgetune.agent.work import Work
from edgetune.errors import DataError, MemoryExhaustedError
from edgetune.planning.spectra import Calibration

MOST_BAD_BATCHES = 5


def train_step(work: Work) -> bool:
    """Train on the next batch; return whether a step was made (not if the batch was bad, or memory ran out)."""
    if work.refresher.due or work.drift.recalibration_due:
        _refresh(work)
    passes: dict[int, int] = {}
    fed = Fed()
    try:
        return _train(work, fed, passes)
    except MemoryExhaustedError as error:
        text = str(error)  # the error itself holds on to everything that was alive where it arose
    _answer(work, fed, passes, text)
    return False


def _train(work: Work, fed: Fed, passes: dict[int, int]) -> bool:
    started = time.perf_counter()
    meter, plan, epoch = work.parts.meter, work.budgeter.plan, work.supply.epoch
    work.begin_measuring()

    def keep(piece: Fed) -> None:
        first = [row for row, one in enumerate(piece.samples) if not one.replayed and not passes[one.id]]
        work.replay.keep([piece.samples[row] for row in first], piece.features, first, work.feeder.read)

    work.session.hyper["learning_rate"] = work.learning_rate * work.drift.rate_factor
    work.make_step(work.supply.taker(passes, fed.bad), fed, keep)
    work.supply.quarantine(fed.bad)
    if not fed.samples:
        return False
    report = work.session.report
    if not (math.isfinite(report.loss) and math.isfinite(report.gradient_norm)):
        _recover(work, fed, passes, "loss" if not math.isfinite(report.loss) else "gradient")
        return False
    peak_bytes = work.feeder.peak_bytes(meter)
    measured_bytes = max(peak_bytes, work.feeder.decode_peak_bytes)
    work.step += 1
    work.supply.trained(fed.samples, passes, work.step)
    work.gate.tasks.trained(fed.samples)
    if work.feeder.cache is not None:
        mine = (sample for sample in fed.samples if not sample.replayed)
        last = [sample for sample in mine if passes[sample.id] + 1 >= work.config.epochs]
        work.feeder.cache.forget(sample.sha256 for sample in last)
    work.enforcer.went_well()
    seconds = {**fed.seconds, **report.seconds}
    accuracy = report.correct / max(report.samples, 1)
    allowance = work.enforcer.allowance
    work.journal.event(
        "step", step=work.step, epoch=epoch, loss=report.loss, accuracy=accuracy, epsilon=plan.epsilon,
        learning_rate=work.session.hyper["learning_rate"],
        ranks=dict(plan.ranks), energy=dict(report.energy), predicted_peak_bytes=plan.predicted_peak_bytes,
        measured_peak_bytes=measured_bytes, decode_peak_bytes=work.feeder.decode_peak_bytes,
        budget_bytes=allowance.asked, effective_budget_bytes=allowance.limit, planned_bytes=plan.budget_bytes,
        resident_bytes=allowance.resident, condition=work.enforcer.condition.value, samples=len(fed.samples),
        replayed=sum(sample.replayed for sample in fed.samples),
        seconds={name: round(value, 6) for name, value in seconds.items()},
    )  # fmt: skip
    energy = {name: float(value) for name, value in report.energy.items() if math.isfinite(value)}
    if len(fed.samples) == work.batch:
        work.tell_timeline(plan)
    work.judge_decoding()
    work.enforcer.measured(peak_bytes, resettable=meter.resettable is not False)
    if len(fed.samples) == work.batch:  # a shorter one says less, and its batch rank is nearly full
        work.refresher.observe(work.step, energy, work.budgeter.plan)
        kept_as = json.dumps([plan.ranks, plan.selection], sort_keys=True)
        work.tell_drift(work.drift.stepped(report.loss, list(energy.values()), kept_as))
    taken_seconds = time.perf_counter() - started
    work.mean_seconds += (taken_seconds - work.mean_seconds) * (0.1 if work.mean_seconds else 1.0)
    work.now.epoch, work.now.loss, work.now.accuracy = epoch, report.loss, accuracy
    work.now.measured_peak_bytes = measured_bytes
    work.now.energy = sum(energy.values()) / len(energy) if energy else None
    work.show()
    if work.replay.crowded and work.step % work.config.checkpoint_every:
        work.save(evaluate=False)
    return True


def _answer(work: Work, fed: Fed, passes: dict[int, int], text: str) -> None:
    """Take back a step in which memory ran out, and go on with a lower plan: no sample is lost, none trained twice."""
    work.supply.quarantine(fed.bad)
    bad = {sample.id for sample, _ in fed.bad}
    whole, samples = work.session.whole, [work.ledger.get(number) for number in passes if number not in bad]
    after = "nothing was applied: the batch is trained again" if whole else "the update was broken off: back to what is"
    after += "" if whole else f" stored of step {work.keeper.saved_step or 0}"
    work.journal.event(
        "exhausted", f"{text}; {after}", step=work.step, reason=text, applied=not whole, samples=len(samples),
        **work.enforcer.figures(),
    )  # fmt: skip
    work.session.discard()
    release_memory()
    if whole:
        work.supply.give_back(samples, passes)
    else:
        go_back(work)
    work.enforcer.exhausted(f"step {work.step + 1} ran out of memory")


def _refresh(work: Work) -> None:
    """Measure new bases on the batches that come next: the one in which they fell may hold old and new data."""
    if len(work.supply.preview(work.batch)) < work.batch:
        return  # too little data to tell
    work.journal.enter(State.CALIBRATING, "new bases")
    work.drift.recalibrated()
    features = work.next_features(work.refresher.batches(work.batch, work.config.calibration_batches))
    try:
        session = work.measuring("new bases")
        calibration = work.refresher.measure(work.step, session, work.parts.meter, features)
    except MemoryExhaustedError as error:
        text = str(error)
    else:
        if calibration is not None:
            _rebase(work, calibration)
        return
    work.enforcer.exhausted(f"at step {work.step}, new bases: {text}")


def _rebase(work: Work, calibration: Calibration) -> None:
    old, plan = work.budgeter.plan, work.budgeter.refresh(calibration)
    work.keeper.set_calibration(work.step, plan.calibration)
    reason, figures = work.refresher.refreshed(old, plan)
    work.use(plan, "refresh", reason, **figures)
    release_memory()


def _recover(work: Work, fed: Fed, passes: dict[int, int], what: str) -> None:
    """Answer a step that was not finite, and was therefore not applied: never train again the samples that broke it.

    Where each of them is found, the others of the batch go back to their places. Where no sample alone broke it, or all
    do, the weights are at fault: back to the last checkpoint. What then is broken alone, or else the whole batch, is
    taken out of use, because the same steps would come to the same end.
    """
    reason = f"the {what} was not finite at step {work.step + 1}"
    new = [sample for sample in fed.samples if not sample.replayed]
    bad = culprits(work, fed.samples) if work.session.whole else []
    if bad and len(bad) < len(fed.samples):
        work.session.discard()
        # First what is trained, else a run that is killed here goes on from where they were not yet out of use.
        if work.step != work.keeper.saved_step:
            work.save(evaluate=False)
        work.supply.quarantine(((sample, reason) for sample in bad), work.step + 1)
        work.supply.give_back((sample for sample in new if sample not in bad), passes)
        text = f"{reason}: nothing was applied; {len(bad)} of {len(fed.samples)} samples broke it, the others stay"
        work.journal.event("not_finite", text, step=work.step, culprits=len(bad), samples=len(fed.samples))
        return
    go_back(work)
    bad = culprits(work, fed.samples) or new  # those that are replayed were trained before, and well
    work.supply.quarantine(((sample, reason) for sample in bad), work.step + 1)
    work.supply.rebuild()
    text = f"{reason}: back to step {work.step}, without {len(bad)} of {len(fed.samples)} samples"
    work.journal.event("not_finite", text, step=work.step, culprits=len(bad), samples=len(fed.samples))
    work.bad_batches += 1
    if work.bad_batches >= MOST_BAD_BATCHES:
        raise DataError(
            f"{MOST_BAD_BATCHES} batches without a checkpoint in between gave a loss that is not finite; the "
            "learning rate is likely too high: lower --learning-rate and run again (the last checkpoint is intact)"
        )
