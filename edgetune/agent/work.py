"""What a run is made of, in one place: its parts, where it stands, and what every phase of it does with them.

Knows the other modules of this package; nothing of the order in which a run goes through its phases.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from edgetune.agent.budget import Budgeter, PlanRequest, same_shape, summary
from edgetune.agent.config import AgentConfig
from edgetune.agent.feeder import Feeder
from edgetune.agent.journal import Journal
from edgetune.agent.keeper import Keeper
from edgetune.agent.ledger import Ledger
from edgetune.agent.parts import Parts
from edgetune.agent.refresher import Refresher
from edgetune.agent.supply import Supply
from edgetune.agent.view import Snapshot
from edgetune.bundle import Array, Bundle
from edgetune.planning.plan import Plan
from edgetune.planning.selection import described

MOST_EVALUATED = 1024


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
        """Make a first plan and load the session.

        Raises:
            BudgetError: no plan fits. EngineError: no runtime, or not the one that the bundle needs.
        """
        self.bundle, self.config, self.parts, self.journal = bundle, config, parts, journal
        self.ledger, self.feeder, self.keeper, self.supply = ledger, feeder, keeper, supply
        self.batch, self.seed = supply.batch, supply.seed
        self.refresher = Refresher(bundle.manifest, journal)
        self.step, self.bad_batches, self.mean_seconds = 0, 0, 0.0
        self.accuracy_before: float | None = None
        self.accuracy: float | None = None
        self.now = Snapshot(budget_bytes=config.budget_bytes)
        request = PlanRequest(
            self.batch, config.budget_bytes, config.activation_budget_bytes, config.epsilon, config.allocation,
            config.codec,
        )  # fmt: skip
        runtime_bytes = parts.runtime_bytes(bundle, config.engine, config.memory)
        self.budgeter = Budgeter(bundle.manifest, request, runtime_bytes, parts.reserve_bytes)
        self.make_session()

    def make_session(self) -> None:
        """Load the bundle with its exported weights, for the plan in force."""
        plan = self.in_session = self.budgeter.plan
        self.session = self.parts.session_factory(
            self.bundle,
            plan,
            engine=self.config.engine,
            hyper=dict(self.config.hyper),
            seed=self.seed,
            memory=self.config.memory,
        )

    def use(self, plan: Plan, event: str, reason: str, **fields: Any) -> None:
        """Log a plan that came into force and hand it to the session."""
        epsilon = f", {described(plan.selection)}" if plan.epsilon is None else f", ε {plan.epsilon:.4f}"
        fields.update(summary(plan))
        self.journal.event(event, f"{event}: {reason}{epsilon}", step=self.step, reason=reason, **fields)
        if not same_shape(plan, self.in_session):
            self.session.set_plan(plan)
        self.in_session = plan

    def next_features(self, batches: int) -> Iterator[tuple[Array, ...]]:
        """Yield the features of the next ``batches`` batches, which stay to be trained."""
        rows = self.supply.preview(self.batch * batches)
        return self.feeder.batches(rows, self.batch, self.session, self.budgeter.plan.micro_batch)

    def evaluate(self) -> float | None:
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

    def save(self, *, evaluate: bool = True) -> bool:
        """Make everything up to this step permanent; return whether the disk let it happen."""
        if evaluate:
            self.evaluate()
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
            self.bad_batches = 0
        return saved

    def show(self) -> None:
        """Bring the view up to date."""
        now, plan = self.now, self.budgeter.plan
        now.step, now.heldout_accuracy, now.epsilon = self.step, self.accuracy, plan.epsilon
        now.predicted_peak_bytes = plan.predicted_peak_bytes
        now.codecs = f"{described(plan.selection)} ({plan.allocation})"
        now.steps_per_second = 1 / self.mean_seconds if self.mean_seconds else 0.0
        now.refreshes = self.refresher.certificate.refreshes
        now.quarantined = self.supply.quarantined
        self.journal.view.update(now)
