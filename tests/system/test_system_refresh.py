"""Bases that no longer suit the data, with the real engine: what the certificate sees, and what a refresh is worth."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import edgetune
from edgetune.bundle import Array
from edgetune.engines.certificate import Finding, Kind
from edgetune.errors import DataError, UsageError
from tests.engines.workshop import bundle_of, plan_of, same_bits, samples

BATCH, CHANGE, STEPS = 32, 20, 36
MASK = (np.where(np.indices((16, 16)).sum(0) % 2, 1, -1) * (np.arange(16) > 11)).astype(np.float32)
"""All but a strip covered, and every second pixel of it inverted: what was smooth is as rough as can be."""


def batch_of(number: int, *, changed: bool) -> tuple[Array, Array]:
    x, y = samples(BATCH, seed=100 + number)
    return x * MASK if changed else x, y


class Watched:
    """A session on a stream that changes at step CHANGE, refreshed as its certificate says. Its weights stay."""

    def __init__(self) -> None:
        bundle = bundle_of("hosvd")
        still = {"learning_rate": 0.0}
        calibration = [batch_of(-k, changed=False) for k in (1, 2)]
        plan = self.plan = edgetune.plan(bundle, batch=BATCH, epsilon=0.95, calibration=calibration)
        self.session = edgetune.TrainingSession(bundle, plan, hyper=still)
        exact = edgetune.plan(bundle, batch=BATCH, epsilon=1.0)
        self.exact = edgetune.TrainingSession(bundle, exact, hyper=still, verify=False)
        self.certificate = edgetune.Certificate()
        self.certificate.restart(self.session.promises)
        self.findings: list[tuple[int, Finding]] = []
        self.refreshes: list[int] = []
        self.energies: list[dict[str, float]] = []

    def run(self, until: int) -> None:
        for step in range(len(self.energies), until):
            changed = step >= CHANGE
            if self.certificate.due:
                ahead = (batch_of(step + k, changed=changed)[0] for k in range(2))
                self.session.refresh(ahead)
                self.certificate.refreshed(self.session.promises)
                self.refreshes.append(step)
            self.session.step(*batch_of(step, changed=changed))
            self.energies.append(self.session.report.energy)
            self.findings += [(step, found) for found in self.certificate.observe(self.session.report.energy)]

    def error(self) -> float:
        """Return the relative error of the weight gradient of the layer that reads the trunk's output, of 6 batches."""
        lost = total = 0.0
        for number in range(200, 206):
            given, exact = (s.gradients(*batch_of(number, changed=True))[1] for s in (self.session, self.exact))
            lost += float(np.sum((given["block2.conv1.weight"] - exact["block2.conv1.weight"]) ** 2))
            total += float(np.sum(exact["block2.conv1.weight"] ** 2))
        return float(np.sqrt(lost / total))


def test_an_abrupt_change_is_seen_within_two_steps_and_one_refresh_mends_it() -> None:
    fresh = Watched()
    fresh.run(CHANGE + 2)
    stale = fresh.error()
    fresh.run(STEPS)
    step, fallen = fresh.findings[0]
    assert (fallen.kind, fallen.tensor) == (Kind.FALLEN, "block2.conv1") and step == CHANGE + 1
    assert fresh.refreshes == [CHANGE + 2]
    assert [found.kind for _, found in fresh.findings] == [Kind.FALLEN, Kind.MENDED]
    before, low, after = (
        float(np.mean([energy["block2.conv1"] for energy in fresh.energies[part]]))
        for part in (slice(0, CHANGE), slice(CHANGE, CHANGE + 2), slice(CHANGE + 2, STEPS))
    )
    assert low < before - 0.08 and after > before
    assert fallen.promised == pytest.approx(before, abs=0.01)
    assert fresh.error() < stale / 2
    old, new = fresh.plan, fresh.session.plan
    assert (new.ranks, new.ledger, new.predicted_peak_bytes) == (old.ranks, old.ledger, old.predicted_peak_bytes)


def test_a_refreshed_session_goes_on_from_its_state_bit_for_bit() -> None:
    bundle, plan = bundle_of("hosvd"), plan_of(bundle_of("hosvd"), BATCH)
    one = edgetune.TrainingSession(bundle, plan)
    one.step(*batch_of(0, changed=False))
    refreshed = one.refresh([batch_of(k, changed=True)[0] for k in range(2)])
    assert refreshed.calibration is not None and refreshed.calibration.samples == 2 * BATCH
    other = edgetune.TrainingSession(bundle, refreshed)
    other.load_state(one.state())
    for session in (one, other):
        session.step(*batch_of(1, changed=True))
    assert same_bits(one.state(), other.state()) and one.report.energy == other.report.energy


def test_a_refresh_says_what_it_lacks() -> None:
    dense, lossy = bundle_of("dense"), bundle_of("hosvd")
    with pytest.raises(UsageError, match="no codec in force has bases"):
        edgetune.TrainingSession(dense, edgetune.plan(dense, batch=4), verify=False).refresh([])
    session = edgetune.TrainingSession(lossy, plan_of(lossy), verify=False)
    with pytest.raises(DataError, match="no batch"):
        session.refresh(iter(()))

    def broken() -> Iterator[Array]:
        yield np.full((4, 1, 16, 16), np.nan, np.float32)

    with pytest.raises(DataError, match="not finite"):
        session.refresh(broken())
    assert session.plan is plan_of(lossy), "the old bases are still in force"
