"""How a run begins: with a calibration and a first plan, or from a checkpoint.

Knows a run's work; nothing of its loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from edgetune.agent.budget import PER_LAYER, PlanRequest, release_memory
from edgetune.agent.comparing import BATCHES, chooses, compare
from edgetune.agent.culprits import culprits
from edgetune.agent.service.states import State
from edgetune.agent.work import Work
from edgetune.bundle import Array
from edgetune.engines.calibration import calibrate
from edgetune.engines.certificate import Certificate
from edgetune.engines.exhaustion import telling_exhaustion
from edgetune.engines.gradient_error import Batch
from edgetune.errors import DataError
from edgetune.planning.plan import Plan
from edgetune.planning.spectra import Calibration, identity_calibration


def begin(work: Work, stopping: Callable[[], bool]) -> None:
    """Calibrate on the next batches, plan, measure the untrained model, and keep that: as step 0, or as the step at
    which the bundle was replaced.

    Needs a batch; nothing is done if ``stopping()``.
    """
    if stopping():
        return
    work.journal.enter(State.CALIBRATING, "on the first batches")
    work.enforcer.heed_deaths()
    started = time.perf_counter()
    work.parts.meter.reset()
    calibration = _calibrated(work)
    if calibration is not None:
        work.journal.event(
            "calibrated", f"calibrated on {calibration.samples} samples", samples=calibration.samples,
            step=work.step, measured_peak_bytes=work.parts.meter.peak_bytes(),
            seconds={"calibrate": round(time.perf_counter() - started, 6)},
        )  # fmt: skip
    calibration = _compared(work, calibration)
    work.keeper.set_calibration(work.step, calibration)
    work.use(work.budgeter.replan(calibration), "planned", "first plan", **work.enforcer.figures())
    work.refresher.restart(work.budgeter.plan)
    work.accuracy_before = work.evaluate()
    _settle(work)
    work.enforcer.heed_deaths()
    work.save(evaluate=False)


def resume(work: Work, tensors: Mapping[str, Array], position: Mapping[str, Any]) -> None:
    """Go on from a checkpoint: with its plan where the request is the same, else with a new one."""
    work.step = int(position["step"])
    work.accuracy_before, work.accuracy = position["accuracy_before"], position["accuracy"]
    work.gate.from_plain(position.get("gate"))
    work.refresher.certificate = Certificate.from_plain(position["certificate"])
    work.drift.from_plain(position.get("drift", {}))
    calibration = work.keeper.calibration
    if PlanRequest(**position["request"]) == work.budgeter.request:
        plan = work.budgeter.adopt(Plan.from_json(position["plan"]), calibration, corrected=position["corrected"])
        work.enforcer.adopted()
        if work.feeder.cache is not None:  # made for the plan that was there before any calibration
            work.feeder.cache.resize(plan.cache_bytes)
        work.session.set_plan(plan)
        work.in_session = plan
    else:
        if work.budgeter.request.allocation == PER_LAYER and (calibration is None or not calibration.errors):
            work.session.load_state(tensors)
            calibration = _compared(work, calibration)
            work.keeper.set_calibration(work.step, calibration)
        work.use(work.budgeter.replan(calibration), "planned", "what is asked of the plan has changed")
        work.refresher.restart(work.budgeter.plan)
    work.enforcer.heed_deaths()
    work.session.load_state(tensors)
    work.gate.catch_up()


def go_back(work: Work) -> None:
    """Take up the newest checkpoint again: what was done since has never happened."""
    found = work.keeper.restore()
    work.supply.rebuild()
    if found is not None and not work.keeper.foreign:
        resume(work, found.tensors, found.position)
    else:  # the disk never took a checkpoint of this bundle: begin again from the exported weights
        work.step = 0 if found is None else found.step
        work.keeper.set_calibration(work.step, work.budgeter.plan.calibration)
        work.make_session()
        work.refresher.restart(work.budgeter.plan)
        work.drift.from_plain({})


def _calibrated(work: Work) -> Calibration | None:
    """Calibrate on the next batches, without samples that would make it impossible.

    Raises:
        DataError: an activation is not finite, and no sample alone is the cause.
    """
    while True:
        batches = work.config.calibration_batches
        try:
            return calibrate(work.measuring("the calibration"), work.bundle.manifest, work.next_features(batches))
        except DataError:
            bad = culprits(work, work.supply.preview(work.batch * batches))
            if not bad:
                raise
        work.supply.quarantine((sample, "the loss was not finite in the calibration") for sample in bad)
        work.supply.rebuild()


def _compared(work: Work, calibration: Calibration | None) -> Calibration | None:
    """Return ``calibration`` with the gradient errors by which a per-layer plan is chosen, if one is asked for."""
    manifest, meter, budgeter = work.bundle.manifest, work.parts.meter, work.budgeter
    if budgeter.request.allocation != PER_LAYER or not chooses(manifest):
        return calibration
    started = time.perf_counter()
    release_memory()
    meter.reset()
    resident_bytes = None if meter.resettable is False else meter.peak_bytes()

    def feed(samples: int) -> list[Batch]:
        rows = work.supply.preview(samples * BATCHES)
        return work.feeder.labelled(rows, samples, work.session, budgeter.plan.micro_batch)

    known = identity_calibration(manifest, work.batch) if calibration is None else calibration
    with telling_exhaustion("the comparison of codecs"):
        found = compare(
            work.session, manifest, known, feed,
            lambda samples, held_bytes: budgeter.limits(samples, held_bytes, resident_bytes), meter,
        )  # fmt: skip
    work.session.set_plan(work.in_session)
    work.journal.event(
        "compared", str(found), step=work.step, samples=found.samples, left_out=found.left_out,
        measured_peak_bytes=found.measured_peak_bytes,
        seconds={"compare": round(time.perf_counter() - started, 6)},
    )  # fmt: skip
    return found.calibration


def _settle(work: Work) -> None:
    """Plan for what the runtime keeps for itself, known now that it has run, before a step can overrun."""
    release_memory()
    meter = work.parts.meter
    meter.reset()
    if meter.resettable is not False and (plan := work.budgeter.settle(meter.peak_bytes())) is not None:
        work.use(plan, "planned", "with the memory that is resident after the calibration")
