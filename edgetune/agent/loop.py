"""The agent's loop: take in, calibrate, plan, train, check, keep. Every decision is logged with its reason.

Order matters more than speed here: nothing counts as done before the keeper has made it permanent. Knows the other
modules of this package; nothing of graphs or runtimes.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass

from edgetune.agent.augment import Augmentation
from edgetune.agent.beginning import begin, resume
from edgetune.agent.checkpoint import Checkpoint
from edgetune.agent.config import AgentConfig
from edgetune.agent.feeder import Feeder
from edgetune.agent.governor import Condition
from edgetune.agent.images import Decoder
from edgetune.agent.intake import Intake
from edgetune.agent.journal import Journal
from edgetune.agent.keeper import Keeper
from edgetune.agent.ledger import Ledger
from edgetune.agent.parts import Parts, real_parts
from edgetune.agent.quiet import Rest
from edgetune.agent.rehearsal import rehearse
from edgetune.agent.replay.buffer import Replay
from edgetune.agent.service.service import Service
from edgetune.agent.service.states import State
from edgetune.agent.signals import stopping_on_signals
from edgetune.agent.sources import open_source
from edgetune.agent.state import LOCK, StateDirectory, samples_of
from edgetune.agent.step import train_step
from edgetune.agent.supply import Supply
from edgetune.agent.view import View, make_view
from edgetune.agent.work import Work
from edgetune.bundle import Bundle
from edgetune.errors import BudgetError, MemoryExhaustedError, StorageError
from edgetune.telemetry.runlog import RunLog
from edgetune.version import __version__

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
    source = open_source(config.data, manifest.classes, decoder.suffixes, config.intake, config.state)
    with ExitStack() as stack:
        stack.callback(source.close)
        state = StateDirectory(
            config.state, digest=bundle.digest, model=manifest.model, batch=config.batch, seed=config.seed,
            samples=samples_of(bundle),
        )  # fmt: skip
        stack.callback(state.close)
        ledger = Ledger(state.ledger_path)
        stack.callback(ledger.close)
        log = RunLog(state.log_path)
        stack.callback(log.close)
        shown = make_view(quiet=config.quiet) if view is None else view
        stack.callback(shown.close)
        journal = Journal(log, shown)
        what = {"version": __version__, "model": manifest.model, "bundle": bundle.digest}
        service = Service(config.service, journal, state.path / LOCK, what)
        stack.callback(service.close)
        feeder = Feeder(source, decoder, augment=Augmentation(config.intake.augment, state.seed))
        agent = Agent(bundle, config, state, ledger, journal, feeder, service)
        try:
            with stopping_on_signals(agent):
                return agent.run(parts)
        except Exception as error:
            journal.enter(State.FAILED, str(error))
            raise


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
        service: Service,
    ) -> None:
        self.service = service
        self.bundle, self.config, self.ledger, self.journal, self.feeder = bundle, config, ledger, journal, feeder
        replay = Replay(state.path, config.replay, bundle, journal, ledger, batch=state.batch, seed=state.seed)
        feeder.replay = replay
        self.keeper = Keeper(state.path, ledger, journal, replay, bundle.digest)
        intake = Intake(
            feeder.source, feeder.decoder, ledger, holdout=config.holdout, settle_seconds=config.settle_seconds
        )
        self.stop_reason: str | None = None
        self.supply = Supply(
            config, intake, ledger, journal, replay=replay, batch=state.batch, seed=state.seed, stopping=self.stopping
        )
        self._retry_save_at = self._look_at = 0.0

    def stopping(self) -> bool:
        """Return whether somebody asked for an end. Whoever asks is alive."""
        self.journal.alive()
        return self.stop_reason is not None

    def run(self, parts: Parts | None) -> Outcome:
        """Do everything; see :func:`run_agent`."""
        config, supply = self.config, self.supply
        self.journal.enter(State.CALIBRATING, "starting")
        self.journal.event(
            "start", f"agent started on {config.data}", bundle=self.bundle.digest, model=self.bundle.manifest.model,
            batch=supply.batch, seed=supply.seed, engine=config.engine, budget_bytes=config.budget_bytes,
        )  # fmt: skip
        self.keeper.begin()
        found = self.keeper.restore()
        supply.look()
        supply.rebuild()
        supply.kept(self.keeper.oldest_step, self.keeper.saved_step or 0)
        new = found is None or self.keeper.foreign
        if supply.over and new and self.stop_reason is None and not supply.ready():
            raise supply.no_data()
        if parts is None:
            parts = real_parts(metrics=config.service.metrics_port is not None)
        self.journal.event("engine", parts.engine(config.engine))
        self.service.tell_blindness()
        self._give_way(None)
        work = self.work = Work(
            self.bundle, config, parts,
            journal=self.journal, ledger=self.ledger, feeder=self.feeder, keeper=self.keeper, supply=supply,
        )  # fmt: skip
        try:
            if not work.go_on(self.stopping):  # nothing is loaded yet, so there is nothing to save
                assert self.stop_reason is not None
                self._stopped(self.stop_reason)
                return Outcome(0 if found is None else found.step, None, None, self.stop_reason)
            work.make_session()
            while not self._begin(work, found) and work.go_on(self.stopping):
                pass
            del found
            left = supply.steps_left()
            ends = [] if left is None else [work.step + left]
            ends += [config.max_steps] if config.max_steps is not None else []
            work.now.steps_total = min(ends, default=None)
            reason = self._train()
        except BudgetError as error:
            # It arises between two steps, so what was trained until then is sound and worth keeping.
            if work.loaded and work.step != self.keeper.saved_step:
                work.save(evaluate=False)
            self._stopped(str(error))
            raise
        except Exception as error:
            self._stopped(str(error))
            raise
        return self._finish(reason)

    def _begin(self, work: Work, found: Checkpoint | None) -> bool:
        """Begin, or go on from ``found``; return whether that is done: if not, there must be more memory first."""
        try:
            # A state that was stopped before its first batch has never been calibrated.
            if found is None or self.keeper.foreign or (found.step == 0 and self.keeper.calibration is None):
                work.step = 0 if found is None else found.step
                self._wait_for_a_batch()
                self._give_way(None)
                begin(work, self.stopping)
            else:
                resume(work, found.tensors, found.position)
            if not self.stopping():
                rehearse(work)
            return True
        except BudgetError as error:
            work.enforcer.refused(error)
            return False
        except MemoryExhaustedError as error:
            text = str(error)  # the error itself holds on to everything that was alive where it arose
        self.journal.event("exhausted", text, step=work.step, reason=text, applied=False)
        work.enforcer.exhausted("the beginning ran out of memory")
        return False

    def _wait_for_a_batch(self) -> None:
        while not self.supply.ready() and not self.stopping():
            self.journal.enter(State.WAITING, "for samples")
            if self.supply.over:
                raise self.supply.no_data()
            self.supply.wait()

    def _give_way(self, work: Work | None) -> None:
        """Wait while something has precedence, with everything stored and given back that can be.

        Args:
            work: what is loaded by now, and has been begun; None: nothing.
        """
        reason = self.service.verdict().pause
        if not reason or self.stopping():
            return
        since = time.monotonic()
        before = self.journal.standing
        self.journal.event("yielded", f"paused: {reason}", reason=reason, **self.service.figures())
        self.journal.enter(State.PAUSED, reason)
        if work is not None:
            work.save_before_a_wait()
            work.unload()
        while (reason := self.service.verdict().pause) and not self.stopping():
            self.journal.enter(State.PAUSED, reason)
            self._idle()
        seconds = round(time.monotonic() - since, 3)
        self.journal.event("yield_ended", f"goes on after {seconds:g} s", seconds={"yielded": seconds})
        if before is not None:
            self.journal.enter(before.state, before.reason)
        if work is not None and not self.stopping():
            work.reload()

    def _idle(self) -> None:
        """Let a moment pass; samples go on arriving."""
        time.sleep(self.config.pause_seconds)
        if not self.config.once and time.monotonic() >= self._look_at:
            self.supply.look()
            self._look_at = time.monotonic() + self.config.rescan_seconds

    def _rest_quietly(self) -> None:
        """Train nothing while nothing is to be gained."""
        self.work.save_before_a_wait()
        rest = Rest(self.work)
        self.journal.event("quiet", f"resting: {rest.reason}", step=self.work.step, reason=rest.reason)
        while not self.stopping() and not self.supply.over and not rest.over():
            self.journal.enter(State.WAITING, rest.reason)
            self._idle()
            self._give_way(self.work)

    def _train(self) -> str:
        config, work = self.config, self.work
        while self.stop_reason is None:
            if config.max_steps is not None and work.step >= config.max_steps:
                return f"reached step {config.max_steps}"
            if not self.supply.ready():
                if self.supply.over:
                    return "every sample is trained"
                self.journal.enter(State.WAITING, "for samples")
                # Waiting may take days: what is trained must not depend on the power staying on.
                stuck = self.supply.stalled and not self.journal.storage_failed
                if work.step != self.keeper.saved_step and (stuck or time.monotonic() >= self._retry_save_at):
                    work.save()
                    self._retry_save_at = time.monotonic() + RETRY_SAVE_SECONDS
                self.supply.wait()
                continue
            self._give_way(work)
            if work.drift.quiet and not self.supply.over:
                self._rest_quietly()
            elif work.go_on(self.stopping):
                slow, began = self.service.verdict().slow, time.monotonic()
                self._enter_training(slow)
                if train_step(work) and work.step % config.checkpoint_every == 0:
                    work.save()
                    self.service.counted(self.ledger.counts)
                    if not config.once:
                        self.supply.look()
                if slow:
                    self._rest(2 * time.monotonic() - began)
        return self.stop_reason

    def _rest(self, until: float) -> None:
        """Let the board cool down."""
        while (left := until - time.monotonic()) > 0 and not self.stopping():
            time.sleep(min(left, self.config.pause_seconds))

    def _enter_training(self, slow: str) -> None:
        """Say whether training goes as asked, and if not, why."""
        reasons = [f"resting after every step: {slow}"] if slow else []
        if self.work.enforcer.condition is Condition.DEGRADED:
            reasons.append("less memory than was asked for")
        if self.journal.storage_failed:
            reasons.append("the disk refuses what is written: what is learned is in memory only")
        self.journal.enter(State.DEGRADED if reasons else State.TRAINING, "; ".join(reasons))

    def _finish(self, reason: str) -> Outcome:
        work = self.work
        self.service.notifier.stopping()
        began = work.step > 0 or self.keeper.saved_step is not None or self.journal.storage_failed
        if began and (work.step != self.keeper.saved_step or self.ledger.dirty or self.journal.storage_failed):
            work.reload()
            # Who asks for a stop does not wait for an evaluation; a service manager may kill what takes long.
            work.save(evaluate=work.step != self.keeper.saved_step and self.stop_reason is None)
        self._stopped(reason)
        if self.journal.storage_failed:
            stored = "nothing" if self.keeper.saved_step is None else f"everything up to step {self.keeper.saved_step}"
            raise StorageError(
                f"the disk refused to the end: of {work.step} steps, {stored} is stored; free space or make the state "
                "directory writable, and run again"
            )
        return Outcome(work.step, work.accuracy_before, work.accuracy, reason)

    def _stopped(self, reason: str) -> None:
        work = self.work
        work.show()
        self.journal.event(
            "stopped", f"stopped at step {work.step}: {reason}", step=work.step, reason=reason,
            accuracy_before=work.accuracy_before, accuracy=work.accuracy,
        )  # fmt: skip
