"""A run that rests because nothing is to be gained: it looks at the loss of what arrives, and does not train on it.

Knows a run's work; nothing of its loop. What the losses mean is ``drift/drift.py``'s to say.
"""

from __future__ import annotations

import heapq
import time

import numpy as np

from edgetune.agent.ledger import Sample
from edgetune.agent.work import Work
from edgetune.bundle import Array
from edgetune.errors import MemoryExhaustedError

LOOKED_AT = 64
"""So many of the newest samples are looked at, a micro-batch at a time."""


def losses_of(logits: Array, labels: Array) -> list[float]:
    """Return the cross-entropy of every row of ``logits`` [b, classes] with its label of ``labels`` [b]."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    found: list[float] = (np.log(np.exp(wide).sum(axis=1)) - wide[np.arange(len(labels)), labels]).tolist()
    return found


class Rest:
    """One quiet time. It ends with drift, or when too much waits (:meth:`over`)."""

    def __init__(self, work: Work) -> None:
        self.work, self._look_at, self._newest = work, time.monotonic(), 0
        config = work.config.drift
        self.reason = (
            f"quiet: {config.quiet_after} evaluations without gain; {config.quiet_backlog} batches may wait meanwhile"
        )

    def over(self) -> bool:
        """Look at what arrived, if it is time; return whether training is to go on."""
        work = self.work
        backlog = len(work.supply.pool)
        # A stream is read no further while too much waits, and what is not read says nothing of the world.
        if work.supply.stalled or backlog > work.config.drift.quiet_backlog * work.batch:
            text = f"{backlog} samples wait: training goes on"
            work.journal.event("quiet_ended", text, step=work.step, samples=backlog, reason="backlog")
            work.drift.wake()
        elif time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + work.config.drift.quiet_interval_s
            self._look()
        return not work.drift.quiet

    def _look(self) -> None:
        work = self.work
        fresh = (sample for sample, _, passes in work.ledger.trainable() if passes == 0 and sample > self._newest)
        newest = heapq.nlargest(LOOKED_AT, fresh)
        if not newest:
            return
        self._newest = newest[0]
        # They arrive class by class, say; by content their order tells nothing.
        rows = sorted((work.ledger.get(sample) for sample in newest), key=lambda row: row.sha256)
        started = time.perf_counter()
        work.begin_measuring()
        try:
            losses = self._losses(rows)
        except MemoryExhaustedError as error:
            work.journal.event("looked", f"no look at what waits: {error}", step=work.step, samples=0)
            return
        finding = work.drift.rested(losses)
        work.journal.event(
            "looked", step=work.step, samples=len(losses), loss=float(np.mean(losses)) if losses else None,
            measured_peak_bytes=work.feeder.peak_bytes(work.parts.meter),
            seconds={"look": round(time.perf_counter() - started, 6)},
        )  # fmt: skip
        if finding is not None:
            work.tell_drift([finding])

    def _losses(self, rows: list[Sample]) -> list[float]:
        work, found = self.work, list[float]()
        for fed in work.feeder.images(rows, work.budgeter.plan.micro_batch):
            if fed.samples:  # what cannot be read still waits in the pool, and is quarantined when its turn comes
                with work.computing("the look at what waits"):
                    logits = work.session.predict(fed.features[0])
                found += losses_of(logits, fed.labels)
        return found
