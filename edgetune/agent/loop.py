"""The agent's loop: take in, calibrate, plan, train, check, keep. Every decision is logged with its reason.

Order matters more than speed here: nothing counts as done before the keeper has made it permanent. Knows the other
modules of this package and the planner's plans; nothing of graphs or runtimes.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgetune.agent.budget import PER_LAYER, Budgeter, PlanRequest, release_memory, same_shape, summary
from edgetune.agent.comparing import BATCHES, chooses, compare
from edgetune.agent.config import AgentConfig
from edgetune.agent.feeder import Fed, Feeder
from edgetune.agent.images import Decoder
from edgetune.agent.intake import Intake
from edgetune.agent.journal import Journal
from edgetune.agent.keeper import Keeper
from edgetune.agent.ledger import Ledger
from edgetune.agent.parts import Parts, real_parts
from edgetune.agent.refresher import Refresher
from edgetune.agent.signals import stopping_on_signals
from edgetune.agent.sources import FolderSource
from edgetune.agent.state import StateDirectory
from edgetune.agent.supply import Supply
from edgetune.agent.view import Snapshot, View, make_view
from edgetune.bundle import Array, Bundle
from edgetune.engines.calibration import calibrate
from edgetune.engines.certificate import Certificate
from edgetune.engines.gradient_error import Batch
from edgetune.errors import BudgetError, DataError, StorageError
from edgetune.planning.plan import Plan
from edgetune.planning.selection import described
from edgetune.planning.spectra import Calibration, identity_calibration
from edgetune.telemetry.runlog import RunLog
from edgetune.units import format_bytes

MOST_EVALUATED = 1024
MOST_BAD_BATCHES = 5
RETRY_SAVE_SECONDS = 60.0  # while the agent waits and the disk refuses


@dataclass(frozen=True)
class Outcome:
    """How a run ended. Accuracies are held-out ones, None without held-out samples."""

    step: int
    accuracy_before: float | None
    accuracy: float | None
    reason: str


def run_agent(bundle: Bundle, config: AgentConfig, *, parts: Parts | None = None, view: View | None = None) -> Outcome:
    """Run the agent until its work is done (``once``, ``max_steps``) or SIGTERM or SIGINT asks it to stop.

    Args:
        parts: replace the real engine, meter and runtime measure. view: replaces the one that suits the terminal.

    Raises:
        UsageError, DataError, StateError, BudgetError, EngineError, BundleError: as their names say; the last
            checkpoint is intact.
        StorageError: the disk refused to the end; what it held before is intact.
    """
    manifest = bundle.manifest
    config.check(manifest.optimizer.scalars)
    decoder = Decoder(manifest)
    source = FolderSource(config.data, manifest.classes, decoder.suffixes)
    with ExitStack() as stack:
        made_with = {"digest": bundle.digest, "model": manifest.model}
        state = StateDirectory(config.state, **made_with, batch=config.batch, seed=config.seed)
        stack.callback(state.close)
        ledger = Ledger(state.ledger_path)
        stack.callback(ledger.close)
        log = RunLog(state.log_path)
        stack.callback(log.close)
        shown = make_view(quiet=config.quiet) if view is None else view
        stack.callback(shown.close)
        agent = Agent(bundle, config, state, ledger, Journal(log, shown), Feeder(source, decoder))
        with stopping_on_signals(agent):
            return agent.run(parts)


class Agent:
    """One run on an opened state directory; made by :func:`run_agent`."""

    def __init__(
        self,
        bundle: Bundle,
        config: AgentConfig,
        state: StateDirectory,
        ledger: Ledger,
        journal: Journal,
        feeder: Feeder,
    ) -> None:
        self.bundle, self.config, self.ledger, self.journal, self.feeder = bundle, config, ledger, journal, feeder
        self.batch, self.seed = state.batch, state.seed
        self.keeper = Keeper(state.path, ledger, journal)
        intake = Intake(
            feeder.source, feeder.decoder, ledger, holdout=config.holdout, settle_seconds=config.settle_seconds
        )
        self.stop_reason: str | None = None
        self.supply = Supply(
            config, intake, ledger, journal, batch=self.batch, seed=self.seed,
            stopping=lambda: self.stop_reason is not None,
        )  # fmt: skip
        self.refresher = Refresher(bundle.manifest, journal)
        self.step = 0
        self.accuracy_before: float | None = None
        self.accuracy: float | None = None
        self._retry_save_at = 0.0
        self._bad_batches = 0
        self._now = Snapshot(budget_bytes=config.budget_bytes)
        self._mean_seconds = 0.0

    # ---- the whole ------------------------------------------------------------------------------------------------
    def run(self, parts: Parts | None) -> Outcome:
        """Do everything; see :func:`run_agent`."""
        config, supply = self.config, self.supply
        self.journal.event(
            "start", f"agent started on {config.data}", bundle=self.bundle.digest, model=self.bundle.manifest.model,
            batch=self.batch, seed=self.seed, engine=config.engine, budget_bytes=config.budget_bytes,
        )  # fmt: skip
        found = self.keeper.restore()
        supply.look()
        supply.rebuild()
        if config.once and found is None and self.stop_reason is None and not supply.ready():
            raise supply.no_data()
        self.parts = real_parts() if parts is None else parts
        self.journal.event("engine", self.parts.engine(config.engine))
        request = PlanRequest(
            self.batch, config.budget_bytes, config.activation_budget_bytes, config.epsilon, config.allocation,
            config.codec,
        )  # fmt: skip
        runtime_bytes = self.parts.runtime_bytes(self.bundle, config.engine)
        self.budgeter = Budgeter(self.bundle.manifest, request, runtime_bytes, self.parts.reserve_bytes)
        self._make_session()
        try:
            # A state that was stopped before its first batch has never been calibrated.
            if found is None or (found.step == 0 and self.keeper.calibration is None):
                self._begin()
            else:
                self._resume(found.tensors, found.position)
                del found
            ends = [self.step + supply.steps_left()] if config.once else []
            ends += [config.max_steps] if config.max_steps is not None else []
            self._now.steps_total = min(ends, default=None)
            reason = self._train()
        except BudgetError as error:
            # It arises between two steps, so what was trained until then is sound and worth keeping.
            if self.step != self.keeper.saved_step:
                self._save(evaluate=False)
            self._stopped(str(error))
            raise
        except Exception as error:
            self._stopped(str(error))
            raise
        return self._finish(reason)

    def _train(self) -> str:
        config = self.config
        while self.stop_reason is None:
            if config.max_steps is not None and self.step >= config.max_steps:
                return f"reached step {config.max_steps}"
            if not self.supply.ready():
                if config.once:
                    return "every sample is trained"
                # Waiting may take days: what is trained must not depend on the power staying on.
                if self.step != self.keeper.saved_step and time.monotonic() >= self._retry_save_at:
                    self._save()
                    self._retry_save_at = time.monotonic() + RETRY_SAVE_SECONDS
                self.supply.wait()
            elif self._train_step() and self.step % config.checkpoint_every == 0:
                self._save()
                if not config.once:
                    self.supply.look()
        return self.stop_reason

    def _finish(self, reason: str) -> Outcome:
        began = self.step > 0 or self.keeper.saved_step is not None or self.journal.storage_failed
        if began and (self.step != self.keeper.saved_step or self.ledger.dirty or self.journal.storage_failed):
            # Who asks for a stop does not wait for an evaluation; a service manager may kill what takes long.
            self._save(evaluate=self.step != self.keeper.saved_step and self.stop_reason is None)
        self._stopped(reason)
        if self.journal.storage_failed:
            stored = "nothing" if self.keeper.saved_step is None else f"everything up to step {self.keeper.saved_step}"
            raise StorageError(
                f"the disk refused to the end: of {self.step} steps, {stored} is stored; free space or make the state "
                "directory writable, and run again"
            )
        return Outcome(self.step, self.accuracy_before, self.accuracy, reason)

    def _stopped(self, reason: str) -> None:
        self._show()
        self.journal.event(
            "stopped", f"stopped at step {self.step}: {reason}", step=self.step, reason=reason,
            accuracy_before=self.accuracy_before, accuracy=self.accuracy,
        )  # fmt: skip

    # ---- beginnings -----------------------------------------------------------------------------------------------
    def _make_session(self) -> None:
        plan = self._in_session = self.budgeter.plan
        self.session = self.parts.session_factory(
            self.bundle,
            plan,
            engine=self.config.engine,
            hyper=dict(self.config.hyper),
            seed=self.seed,
            memory=self.config.memory,
        )

    def _begin(self) -> None:
        """Calibrate on the first batches, plan, measure the untrained model, and keep that as step 0."""
        while not self.supply.ready() and self.stop_reason is None:
            self.supply.wait()
        if self.stop_reason is not None:
            return
        started = time.perf_counter()
        self.parts.meter.reset()
        calibration = calibrate(
            self.session, self.bundle.manifest, self._next_features(self.config.calibration_batches)
        )
        if calibration is not None:
            self.journal.event(
                "calibrated", f"calibrated on {calibration.samples} samples", samples=calibration.samples,
                step=self.step, measured_peak_bytes=self.parts.meter.peak_bytes(),
                seconds={"calibrate": round(time.perf_counter() - started, 6)},
            )  # fmt: skip
        calibration = self._compared(calibration)
        self.keeper.set_calibration(self.step, calibration)
        self._use(self.budgeter.replan(calibration), "planned", "first plan")
        self.refresher.restart(self.budgeter.plan)
        self.accuracy_before = self._evaluate()
        self._settle()
        self._save(evaluate=False)

    def _compared(self, calibration: Calibration | None) -> Calibration | None:
        """Return ``calibration`` with the gradient errors by which a per-layer plan is chosen, if one is asked for."""
        manifest, meter, budgeter = self.bundle.manifest, self.parts.meter, self.budgeter
        if budgeter.request.allocation != PER_LAYER or not chooses(manifest):
            return calibration
        started = time.perf_counter()
        release_memory()
        meter.reset()
        resident_bytes = None if meter.resettable is False else meter.peak_bytes()

        def feed(samples: int) -> list[Batch]:
            rows = self.supply.preview(samples * BATCHES)
            return self.feeder.labelled(rows, samples, self.session, budgeter.plan.micro_batch)

        known = identity_calibration(manifest, self.batch) if calibration is None else calibration
        found = compare(
            self.session, manifest, known, feed,
            lambda samples, held_bytes: budgeter.limits(samples, held_bytes, resident_bytes), meter,
        )  # fmt: skip
        self.session.set_plan(self._in_session)
        self.journal.event(
            "compared", str(found), step=self.step, samples=found.samples, left_out=found.left_out,
            measured_peak_bytes=found.measured_peak_bytes,
            seconds={"compare": round(time.perf_counter() - started, 6)},
        )  # fmt: skip
        return found.calibration

    def _settle(self) -> None:
        """Plan for what the runtime keeps for itself, known now that it has run, before a step can overrun."""
        release_memory()
        meter = self.parts.meter
        meter.reset()
        if meter.resettable is not False and (plan := self.budgeter.settle(meter.peak_bytes())) is not None:
            self._use(plan, "planned", "with the memory that is resident after the calibration")

    def _next_features(self, batches: int) -> Iterator[tuple[Array, ...]]:
        """Yield the features of the next ``batches`` batches, which stay to be trained."""
        rows = self.supply.preview(self.batch * batches)
        return self.feeder.batches(rows, self.batch, self.session, self.budgeter.plan.micro_batch)

    def _resume(self, tensors: Mapping[str, Array], position: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: with its plan where the request is the same, else with a new one."""
        self.step = int(position["step"])
        self.accuracy_before, self.accuracy = position["accuracy_before"], position["accuracy"]
        self.refresher.certificate = Certificate.from_plain(position["certificate"])
        calibration = self.keeper.calibration
        if PlanRequest(**position["request"]) == self.budgeter.request:
            plan = self.budgeter.adopt(Plan.from_json(position["plan"]), calibration, corrected=position["corrected"])
            self.session.set_plan(plan)
            self._in_session = plan
        else:
            if self.budgeter.request.allocation == PER_LAYER and (calibration is None or not calibration.errors):
                self.session.load_state(dict(tensors))
                calibration = self._compared(calibration)
                self.keeper.set_calibration(self.step, calibration)
            self._use(self.budgeter.replan(calibration), "planned", "what is asked of the plan has changed")
            self.refresher.restart(self.budgeter.plan)
        self.session.load_state(dict(tensors))

    # ---- one step -------------------------------------------------------------------------------------------------
    def _train_step(self) -> bool:
        """Train on the next batch; return whether a step was made (not if the batch was bad)."""
        if self.refresher.due:
            self._refresh()
        started = time.perf_counter()
        meter, plan, epoch = self.parts.meter, self.budgeter.plan, self.supply.epoch
        meter.reset()
        passes: dict[int, int] = {}
        fed = self.feeder.feed(self.supply.taker(passes), self.batch, self.session, plan.micro_batch)
        self.supply.quarantine(fed.bad)
        if not fed.samples:
            return False
        began = time.perf_counter()
        # Handed over in a list, which the session empties: the features are not in memory during the backward pass.
        features, fed.features = list(fed.features), ()
        self.session.step_features(features, fed.labels)
        report, train_seconds = self.session.report, time.perf_counter() - began
        if not (math.isfinite(report.loss) and math.isfinite(report.gradient_norm)):
            self._recover(fed, "loss" if not math.isfinite(report.loss) else "gradient")
            return False
        measured_bytes = meter.peak_bytes()
        self.step += 1
        self.supply.trained(fed.samples, passes, self.step)
        seconds = {"train": train_seconds, **fed.seconds}
        if "train" in report.seconds:  # the session tells its phases apart
            seconds.update(report.seconds)
        accuracy = report.correct / max(report.samples, 1)
        self.journal.event(
            "step", step=self.step, epoch=epoch, loss=report.loss, accuracy=accuracy, epsilon=plan.epsilon,
            ranks=dict(plan.ranks), energy=dict(report.energy), predicted_peak_bytes=plan.predicted_peak_bytes,
            measured_peak_bytes=measured_bytes, budget_bytes=plan.budget_bytes, samples=len(fed.samples),
            seconds={name: round(value, 6) for name, value in seconds.items()},
        )  # fmt: skip
        energy = {name: float(value) for name, value in report.energy.items() if math.isfinite(value)}
        self._check_memory(measured_bytes, resettable=meter.resettable is not False)
        if len(fed.samples) == self.batch:  # a shorter one says less, and its batch rank is nearly full
            self.refresher.observe(self.step, energy, self.budgeter.plan)
        taken_seconds = time.perf_counter() - started
        self._mean_seconds += (taken_seconds - self._mean_seconds) * (0.1 if self._mean_seconds else 1.0)
        self._now.epoch, self._now.loss, self._now.accuracy = epoch, report.loss, accuracy
        self._now.measured_peak_bytes = measured_bytes
        self._now.energy = sum(energy.values()) / len(energy) if energy else None
        self._show()
        return True

    def _check_memory(self, measured_bytes: int, *, resettable: bool) -> None:
        """Lower the plan after an overrun; correct its prediction after the first step."""
        old = self.budgeter.plan
        if self.budgeter.overrun(measured_bytes, resettable=resettable):
            plan = self.budgeter.correct(measured_bytes)
            reason = (
                f"measured {format_bytes(measured_bytes)} against a budget of {format_bytes(old.budget_bytes or 0)}: "
                f"{_kept(old)} -> {_kept(plan)}, micro-batch {old.micro_batch} -> {plan.micro_batch}"
            )
            self._use(plan, "degrade", reason, measured_peak_bytes=measured_bytes)
            release_memory()
        elif not self.budgeter.corrected:
            plan = self.budgeter.correct(measured_bytes)
            self._use(plan, "planned", "corrected by the first measured step", measured_peak_bytes=measured_bytes)
        if (self.budgeter.plan.ranks, self.budgeter.plan.selection) != (old.ranks, old.selection):
            self.refresher.restart(self.budgeter.plan)

    def _refresh(self) -> None:
        """Measure new bases on the batches that come next: the one in which they fell may hold old and new data."""
        if len(self.supply.preview(self.batch)) < self.batch:
            return  # too little data to tell
        features = self._next_features(self.refresher.batches(self.batch, self.config.calibration_batches))
        calibration = self.refresher.measure(self.step, self.session, self.parts.meter, features)
        if calibration is None:
            return
        old, plan = self.budgeter.plan, self.budgeter.refresh(calibration)
        self.keeper.set_calibration(self.step, plan.calibration)
        reason, figures = self.refresher.refreshed(old, plan)
        self._use(plan, "refresh", reason, **figures)
        release_memory()

    def _use(self, plan: Plan, event: str, reason: str, **fields: Any) -> None:
        """Log a plan that came into force and hand it to the session."""
        epsilon = f", {described(plan.selection)}" if plan.epsilon is None else f", ε {plan.epsilon:.4f}"
        fields.update(summary(plan))
        self.journal.event(event, f"{event}: {reason}{epsilon}", step=self.step, reason=reason, **fields)
        if not same_shape(plan, self._in_session):
            self.session.set_plan(plan)
        self._in_session = plan

    def _recover(self, fed: Fed, what: str) -> None:
        """Forget a step that was not finite, go back to the last checkpoint, and never train its batch again."""
        reason = f"the {what} was not finite at step {self.step + 1}"
        self.supply.quarantine(((sample, reason) for sample in fed.samples), self.step + 1)
        found = self.keeper.restore()
        self.supply.rebuild()
        if found is not None:
            self._resume(found.tensors, found.position)
        else:  # the disk never took a checkpoint: begin again from the exported weights
            self.step = 0
            self._make_session()
            self.refresher.restart(self.budgeter.plan)
        self._bad_batches += 1
        if self._bad_batches >= MOST_BAD_BATCHES:
            raise DataError(
                f"{MOST_BAD_BATCHES} batches without a checkpoint in between gave a loss that is not finite; the "
                "learning rate is likely too high: lower --learning-rate and run again (the last checkpoint is intact)"
            )

    # ---- keeping --------------------------------------------------------------------------------------------------
    def _evaluate(self) -> float | None:
        """Return the accuracy on the held-out samples (the oldest MOST_EVALUATED); None if there are none."""
        rows = [self.ledger.get(sample) for sample in self.ledger.heldout(MOST_EVALUATED)]
        if not rows:
            return None
        started = time.perf_counter()
        self.parts.meter.reset()
        correct = total = 0
        for fed in self.feeder.images(rows, self.budgeter.plan.micro_batch):
            self.supply.quarantine(fed.bad)
            if fed.samples:
                logits = self.session.predict(fed.features[0])
                correct += int(np.sum(np.argmax(logits, axis=1) == fed.labels))
                total += len(fed.samples)
        self.accuracy = correct / total if total else None
        self.journal.event(
            "evaluated", "" if self.accuracy is None else f"held-out accuracy {self.accuracy:.1%}", step=self.step,
            accuracy=self.accuracy, correct=correct, samples=total, measured_peak_bytes=self.parts.meter.peak_bytes(),
            seconds={"evaluate": round(time.perf_counter() - started, 6)},
        )  # fmt: skip
        return self.accuracy

    def _save(self, *, evaluate: bool = True) -> bool:
        if evaluate:
            self._evaluate()
        position = {
            "bundle": self.bundle.digest,
            "epoch": self.supply.epoch,
            "seed": self.seed,
            "plan": self.budgeter.plan.to_json(),
            "request": dataclasses.asdict(self.budgeter.request),
            "corrected": self.budgeter.corrected,
            "certificate": self.refresher.certificate.to_plain(),
            "accuracy_before": self.accuracy_before,
            "accuracy": self.accuracy,
        }
        newer = self.step != self.keeper.saved_step
        saved = self.keeper.save(self.step, self.session.state, position)
        if saved and newer:
            self._bad_batches = 0
        return saved

    def _show(self) -> None:
        now, plan = self._now, self.budgeter.plan
        now.step, now.heldout_accuracy, now.epsilon = self.step, self.accuracy, plan.epsilon
        now.predicted_peak_bytes = plan.predicted_peak_bytes
        now.codecs = f"{described(plan.selection)} ({plan.allocation})"
        now.steps_per_second = 1 / self._mean_seconds if self._mean_seconds else 0.0
        now.refreshes = self.refresher.certificate.refreshes
        now.quarantined = self.supply.quarantined
        self.journal.view.update(now)


def _kept(plan: Plan) -> str:
    return described(plan.selection) if plan.epsilon is None else f"ε {plan.epsilon}"
