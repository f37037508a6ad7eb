"""What a run is made of, in one place: its parts, where it stands, and what every phase of it does with them.

Knows the other modules of this package; nothing of the order in which a run goes through its phases.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from edgetune.agent.allowance import AllowanceReader
from edgetune.agent.budget import Budgeter, PlanRequest, release_memory, same_shape, summary
from edgetune.agent.cache import FeatureCache
from edgetune.agent.ceiling import ceiling
from edgetune.agent.config import AgentConfig
from edgetune.agent.deaths import read_deaths
from edgetune.agent.drift.drift import Drift, Finding
from edgetune.agent.enforcement import Enforcer
from edgetune.agent.feeder import Fed, Feeder
from edgetune.agent.gate.gatekeeper import Gatekeeper
from edgetune.agent.journal import Journal
from edgetune.agent.keeper import Keeper
from edgetune.agent.ledger import Ledger, Sample
from edgetune.agent.parts import Parts, Session
from edgetune.agent.refresher import Refresher
from edgetune.agent.supply import Supply
from edgetune.agent.timeline import timeline_fields
from edgetune.agent.view import Snapshot
from edgetune.bundle import Array, Bundle
from edgetune.engines.calibration import Measures
from edgetune.engines.exhaustion import telling_exhaustion
from edgetune.errors import StateError
from edgetune.planning.plan import Plan
from edgetune.planning.selection import described
from edgetune.units import format_bytes


class Work:
    """One run on an opened state directory. ``step`` counts the optimizer updates of the state directory."""

    def __init__(
        self,
        bundle: Bundle,
        config: AgentConfig,
        parts: Parts,
        *,
        journal: Journal,
        ledger: Ledger,
        feeder: Feeder,
        keeper: Keeper,
        supply: Supply,
    ) -> None:
        """Make a first plan; :meth:`make_session` then loads the bundle.

        Raises:
            BudgetError: no plan fits the user's budget. EngineError: no runtime.
        """
        self.bundle, self.config, self.parts, self.journal = bundle, config, parts, journal
        self.ledger, self.feeder, self.keeper, self.supply = ledger, feeder, keeper, supply
        self.batch, self.seed, self.replay = supply.batch, supply.seed, supply.replay
        self.refresher = Refresher(bundle.manifest, journal)
        self.drift = Drift(config.drift)
        self.learning_rate = {**bundle.manifest.optimizer.scalars, **config.hyper}["learning_rate"]
        self.step, self.bad_batches, self.mean_seconds = 0, 0, 0.0
        self.accuracy_before: float | None = None
        self.accuracy: float | None = None
        self.now = Snapshot(budget_bytes=config.budget_bytes)
        reader = AllowanceReader(
            keeper.path, config.budget_bytes, config.reserve_bytes, available=parts.available,
            resident_bytes=parts.resident_bytes, refused=lambda reason: journal.event("budget_refused", reason),
        )  # fmt: skip
        asked = reader.read().asked
        request = PlanRequest(
            self.batch, asked, config.activation_budget_bytes, config.epsilon, config.allocation, config.codec,
            config.micro_batch, config.tail_micro_batch, config.trained, self._cache_bytes(),
            config.memory if parts.packs(config.engine) else "lean",
        )  # fmt: skip
        runtime_bytes = parts.runtime_bytes(bundle, config.engine)
        self.budgeter = Budgeter(bundle.manifest, request, runtime_bytes, parts.reserve_bytes(config.engine))
        self.enforcer = Enforcer(
            self.budgeter, reader, journal, use=self.use, save=self.save_before_a_wait, refusing=config.once,
            deaths=read_deaths(keeper.path), step=lambda: self.step,
        )  # fmt: skip
        feeder.cache = FeatureCache(bundle.manifest.features, self.budgeter.plan.cache_bytes)
        self.gate = Gatekeeper(self)
        self.gate.open()
        self.loaded = False
        self._runtime_bytes, self._phases_bytes = runtime_bytes, dict[str, int]()
        self._timeline_of: Plan | None = None

    def _cache_bytes(self) -> int | None:
        """Return what is asked of the feature cache: nothing, where samples look different in every pass."""
        if not self.config.intake.augment:
            return self.config.cache_bytes
        self.journal.event("cache_off", "there is no feature cache: samples are augmented, another way in every pass")
        return 0

    def make_session(self) -> None:
        """Load the bundle with its exported weights, for the plan in force."""
        self.session: Session = self.parts.session_factory(
            self.bundle,
            self.budgeter.plan,
            engine=self.config.engine,
            hyper=dict(self.config.hyper),
            seed=self.seed,
        )
        self.session.phase_ended = self._phase_ended
        self.in_session, self.loaded = self.budgeter.plan, True

    def unload(self) -> None:
        """Give back what session and cache hold, which is all in the newest checkpoint, until :meth:`reload`."""
        if self.feeder.cache is not None:
            self.feeder.cache.resize(0)
        if self.loaded and self.session.whole and self.keeper.saved_step == self.step:
            del self.session
            self.loaded = False
        release_memory()

    def reload(self) -> None:
        """Take up what :meth:`unload` gave back.

        Raises:
            StateError: the checkpoint is gone.
        """
        if not self.loaded:
            self.make_session()
            found = self.keeper.newest()
            if found is None or found.step != self.step:
                raise StateError(
                    f"the checkpoint of step {self.step} is gone; it held what a pause gave back; run again"
                )
            self.session.load_state(found.tensors)
        if self.feeder.cache is not None:
            self.feeder.cache.resize(self.budgeter.plan.cache_bytes)

    def use(self, plan: Plan, event: str, reason: str, **fields: Any) -> None:
        """Log a plan that came into force and hand it to the session."""
        epsilon = f", {described(plan.selection)}" if plan.epsilon is None else f", ε {plan.epsilon:.4f}"
        fields.update(summary(plan))
        self.journal.event(event, f"{event}: {reason}{epsilon}", step=self.step, reason=reason, **fields)
        if self.feeder.cache is not None:
            self.feeder.cache.resize(plan.cache_bytes)
        if not self.loaded:
            return
        if not same_shape(plan, self.in_session):
            self.session.set_plan(plan)
        if event != "refresh" and (plan.ranks, plan.selection) != (self.in_session.ranks, self.in_session.selection):
            self.refresher.restart(plan)
        self.in_session = plan

    @contextmanager
    def computing(self, what: str) -> Iterator[None]:
        """Within the block an engine computes: under the hard stop, and telling in one way what runs out."""
        self.journal.alive()
        with telling_exhaustion(what), ceiling(self.enforcer.spare_bytes):
            yield

    def make_step(
        self, take: Callable[[], Sample | None], fed: Fed, keep: Callable[[Fed], None] = lambda piece: None
    ) -> None:
        """Make one step on the samples that ``take`` gives, a batch at most; what became of them is in ``fed``.

        The features of one piece of the batch are in memory at a time (``plan.tail_micro_batch``). Nothing is done
        where there is no sample. ``keep`` sees each piece before it is trained.

        Raises:
            MemoryExhaustedError: the session may hold pieces of the step, and tells whether its state is whole.
        """
        plan, session = self.budgeter.plan, self.session
        session.discard()
        while (wanted := min(plan.tail_micro_batch, self.batch - len(fed.samples))) > 0:
            piece = Fed(bad=fed.bad, seconds=fed.seconds)
            self.feeder.feed(take, wanted, session, plan.micro_batch, self.computing, piece)
            self._phase_ended("trunk")
            if piece.samples:
                keep(piece)
                # In a list, which the session empties: the features are not in memory during the backward pass.
                features, piece.features = list(piece.features), ()
                with self.computing("the step"):
                    session.add(features, piece.labels)
                fed.samples += piece.samples
            if len(piece.samples) < wanted:
                break
        if fed.samples:
            with self.computing("the update"):
                session.finish()

    def measuring(self, what: str) -> Measures:
        """Return the session's Gram matrices alone, computed under the hard stop."""
        return _Measuring(self, what)

    def go_on(self, stopping: Callable[[], bool]) -> bool:
        """Return once the plan in force is within what there is; False: somebody asked for an end first."""
        while not stopping():
            if self.enforcer.look():
                return True
            time.sleep(self.config.pause_seconds)
        return False

    def next_features(self, batches: int) -> Iterator[tuple[Array, ...]]:
        """Yield the features of the next ``batches`` batches, which stay to be trained, as many samples at a time as
        the plan trains at once."""
        rows, plan = self.supply.preview(self.batch * batches), self.budgeter.plan
        return self.feeder.batches(rows, plan.tail_micro_batch, self.session, plan.micro_batch, self.computing)

    def evaluate(self) -> float | None:
        """Return the accuracy on the held-out samples; None if there are none."""
        return self.gate.evaluate()

    def begin_measuring(self) -> None:
        """Let the high-water mark start anew; pictures that are unpacked are told apart from what is planned."""
        self.feeder.begin_measuring(self.parts.meter)
        self._phases_bytes.clear()

    def _phase_ended(self, phase: str) -> None:
        peak_bytes = self.feeder.phase_peak_bytes()
        if peak_bytes is not None:
            self._phases_bytes[phase] = max(self._phases_bytes.get(phase, 0), peak_bytes)

    def tell_timeline(self, plan: Plan) -> None:
        """Log what each phase of the step just made was predicted to take under ``plan``, and took: once per plan."""
        if plan is not self._timeline_of:
            self._timeline_of = plan
            fields = timeline_fields(self.bundle.manifest, plan, self._runtime_bytes, self._phases_bytes)
            self.journal.event("timeline", step=self.step, **fields)

    def tell_drift(self, findings: Iterable[Finding]) -> None:
        """Log how the world changed, and what follows."""
        for found in findings:
            self.journal.event(
                "drift", str(found), step=self.step, what=found.what, before=found.before, after=found.after,
                values=found.values, actions=list(found.actions),
            )  # fmt: skip

    def judge(self, phase: str, peak_bytes: int) -> None:
        """Hold a phase between steps, and the unpacking of pictures in it, to the effective budget."""
        self.judge_decoding()
        self.enforcer.measured_phase(phase, peak_bytes, resettable=self.parts.meter.resettable is not False)

    def judge_decoding(self) -> None:
        """Say which picture took more than the effective budget while it was unpacked: nobody can plan for that."""
        feeder, limit_bytes = self.feeder, self.enforcer.allowance.limit
        if feeder.decode_peak_bytes > limit_bytes:
            text = (
                f"unpacking {feeder.decode_peak_path} took {format_bytes(feeder.decode_peak_bytes)}, over the "
                f"effective budget of {format_bytes(limit_bytes)}; smaller pictures of the same would not"
            )
            self.journal.event(
                "decode_overrun", text, step=self.step, path=feeder.decode_peak_path,
                measured_peak_bytes=feeder.decode_peak_bytes, effective_budget_bytes=limit_bytes,
            )  # fmt: skip

    def save(self, *, evaluate: bool = True) -> bool:
        """Make everything up to this step permanent; return whether the disk let it happen."""
        if evaluate and self.gate.due(self.step):
            self.drift.evaluated(self.evaluate())
        position = {
            "bundle": self.bundle.digest,
            "epoch": self.supply.epoch,
            "seed": self.seed,
            "plan": self.budgeter.plan.to_json(),
            "request": dataclasses.asdict(self.budgeter.request),
            "corrected": self.budgeter.corrected,
            "certificate": self.refresher.certificate.to_plain(),
            "drift": self.drift.to_plain(),
            "accuracy_before": self.accuracy_before,
            "accuracy": self.accuracy,
            "gate": self.gate.to_plain(),
        }
        newer = self.step != self.keeper.saved_step
        self.parts.meter.reset()
        saved = self.keeper.save(self.step, self.session.state, position)
        self.enforcer.measured_phase(
            "the checkpoint", self.parts.meter.peak_bytes(), resettable=self.parts.meter.resettable is not False,
            lowering=False,
        )  # fmt: skip
        if saved:
            self.supply.kept(self.keeper.oldest_step, self.step)
        if saved and newer:
            self.bad_batches = 0
        if saved:
            self.gate.consider()
        return saved

    def save_before_a_wait(self) -> None:
        """Make what is trained permanent, if it is not: a wait may be long."""
        if self.loaded and self.session.whole and self.step != self.keeper.saved_step:
            self.save(evaluate=False)

    def show(self) -> None:
        """Bring the view up to date."""
        now, plan = self.now, self.budgeter.plan
        now.budget_bytes, now.condition = self.budgeter.limit_bytes, self.enforcer.condition.value
        now.step, now.heldout_accuracy, now.epsilon = self.step, self.accuracy, plan.epsilon
        now.predicted_peak_bytes = plan.predicted_peak_bytes
        now.codecs = f"{described(plan.selection)} ({plan.allocation})"
        now.steps_per_second = 1 / self.mean_seconds if self.mean_seconds else 0.0
        now.refreshes = self.refresher.certificate.refreshes
        now.quarantined = self.supply.quarantined
        self.journal.view.update(now)


class _Measuring:
    def __init__(self, work: Work, what: str) -> None:
        self._work, self._what = work, what

    def grams(self, features: tuple[Array, ...]) -> dict[str, dict[str, Array]]:
        with self._work.computing(self._what):
            return self._work.session.grams(features)
