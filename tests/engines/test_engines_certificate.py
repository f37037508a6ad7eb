"""The energy certificate on streams of numbers: what it sees, how soon, how often, and what it leaves alone."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.engines.certificate import INTERVAL, PATIENCE, REFERENCE_STEPS, Certificate, Finding, Kind

Stream = Callable[[int], float]


def watched(stream: Stream, steps: int, after_refresh: Callable[[int], Stream] | None = None) -> list[tuple[int, Kind]]:
    """Feed ``stream(step)``, and refresh whenever that is due; ``after_refresh(step)`` is the stream from there on."""
    certificate, log = Certificate(), []
    certificate.restart({"a": 0.5})
    for step in range(steps):
        log += [(step, finding.kind) for finding in certificate.observe({"a": stream(step)})]
        if certificate.due:
            certificate.refreshed({"a": 0.5})
            stream = stream if after_refresh is None else after_refresh(step)
    return log


def noise(scale: float, seed: int = 0) -> Stream:
    rng = np.random.default_rng(seed)
    return lambda step: 0.9 + scale * float(rng.standard_normal())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(scale=st.floats(0, 0.1), seed=st.integers(0, 10_000), kind=st.sampled_from(("normal", "uniform", "one_sided")))
def test_a_stationary_stream_never_triggers(scale: float, seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    draws = {
        "normal": rng.standard_normal(500), "uniform": rng.uniform(-2, 2, 500),
        "one_sided": -np.abs(rng.standard_normal(500)),
    }[kind]  # fmt: skip
    assert watched(lambda step: 0.9 + scale * float(draws[step]), 500) == []


@pytest.mark.parametrize("fall", [0.03, 0.1, 0.4])
@pytest.mark.parametrize("at", [REFERENCE_STEPS, 100])
def test_a_fall_is_seen_within_a_few_steps_and_refreshed_once(fall: float, at: int) -> None:
    still = noise(0.001)
    log = watched(lambda step: still(step) - (fall if step >= at else 0), 400, after_refresh=lambda step: still)
    assert [kind for _, kind in log] == [Kind.FALLEN, Kind.MENDED]
    (seen, _), (judged, _) = log
    least = PATIENCE if fall > 0.05 else PATIENCE + 4  # what is hardly over the margin shows in the mean later
    assert at + PATIENCE - 1 <= seen < at + least
    assert judged == seen + REFERENCE_STEPS


def test_one_odd_batch_is_no_fall() -> None:
    assert watched(lambda step: 0.4 if step in (20, 60, 61 + 60) else 0.9, 200) == []


def test_a_refresh_that_does_not_help_is_said_once_and_not_repeated() -> None:
    """The rank is too small for the new data: the energy stays where it is."""
    still = noise(0.001)
    log = watched(lambda step: still(step) - (0.2 if step >= 50 else 0), 2000)
    assert [kind for _, kind in log] == [Kind.FALLEN, Kind.SHORT]


def test_bases_that_never_keep_the_bound_are_refreshed_ever_more_rarely() -> None:
    certificate, refreshes = Certificate(), []
    certificate.restart({"a": 0.9})
    for step in range(3000):
        certificate.observe({"a": 0.8})
        if certificate.due:
            refreshes.append(step)
            certificate.refreshed({"a": 0.9})
    assert refreshes[0] < REFERENCE_STEPS, "a promise of the plan needs no reference"
    gaps = np.diff(refreshes)
    assert gaps[0] >= INTERVAL and all(later >= 2 * earlier for earlier, later in itertools.pairwise(gaps))
    assert len(refreshes) <= 9


def test_a_slow_drift_triggers_rarely() -> None:
    """0.1 lost in 1000 steps, each refresh mends it all: once per margin of 0.02, not once per step."""
    log = watched(
        lambda step: 0.9 - 1e-4 * step, 1000, after_refresh=lambda start: lambda step: 0.9 - 1e-4 * (step - start)
    )
    fallen = [step for step, kind in log if kind is Kind.FALLEN]
    assert 2 <= len(fallen) <= 5
    assert min(np.diff(fallen)) > 150


def test_energy_at_the_threshold_does_not_flap() -> None:
    """Hysteresis: swinging around the threshold, and refreshed without effect, it is found at most once."""
    swing = [0.0, -0.021, -0.019, -0.022, -0.018, -0.021]
    log = watched(lambda step: 0.9 + (swing[step % 6] if step > 20 else 0), 600)
    assert [kind for _, kind in log].count(Kind.FALLEN) <= 1


def test_energies_that_are_not_finite_say_nothing() -> None:
    certificate = Certificate()
    certificate.restart({"a": 0.5})
    for step in range(100):
        odd = (math.nan, math.inf, -math.inf)[step % 3]
        assert certificate.observe({"a": 0.9 if step % 2 else odd, "b": odd}) == []
    assert certificate.due == () and certificate.standing() == {"a": {"promised": 0.9, "measured": 0.9}}


def test_all_that_fell_is_refreshed_at_once_and_judged_each() -> None:
    certificate = Certificate()
    certificate.restart({})
    for _ in range(20):
        certificate.observe({"a": 0.9, "b": 0.8, "c": 0.7})
    found: list[Finding] = []
    while not found:
        found = certificate.observe({"a": 0.6, "b": 0.5, "c": 0.7})
    assert {finding.tensor for finding in found} == {"a", "b"} == set(certificate.due)
    assert all(abs(finding.promised - {"a": 0.9, "b": 0.8}[finding.tensor]) < 1e-9 for finding in found)
    certificate.refreshed({})
    judged = [f for _ in range(REFERENCE_STEPS) for f in certificate.observe({"a": 0.9, "b": 0.5, "c": 0.7})]
    assert {finding.tensor: finding.kind for finding in judged} == {"a": Kind.MENDED, "b": Kind.SHORT}


def test_what_nothing_can_mend_is_accepted_at_its_new_level() -> None:
    certificate = Certificate()
    for _ in range(20):
        certificate.observe({"a": 0.9})
    kinds = []
    for step in range(600):
        kinds += [finding.kind for finding in certificate.observe({"a": 0.6 if step < 300 else 0.3})]
        certificate.accept(certificate.due)
    assert kinds == [Kind.FALLEN, Kind.FALLEN], "once for each level"


def test_a_fall_that_passes_before_anybody_acts_is_forgotten() -> None:
    certificate = Certificate()
    for step in range(40):
        certificate.observe({"a": 0.5 if 20 <= step < 23 else 0.9})
        assert bool(certificate.due) == (21 <= step < 23)


def test_a_refresh_that_cannot_be_made_is_tried_again_later() -> None:
    certificate, tries = Certificate(), []
    for step in range(200):
        certificate.observe({"a": 0.5 if step >= 20 else 0.9})
        if certificate.due:
            tries.append(step)
            certificate.failed()
    assert tries[:4] == [21, 41, 81, 161]


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.floats(0, 1) | st.just(math.nan), min_size=1, max_size=80), cut=st.integers(0, 80))
def test_a_certificate_restored_from_json_decides_the_same(values: list[float], cut: int) -> None:
    def steps(certificate: Certificate, part: list[float]) -> list[list[Finding]]:
        found = []
        for value in part:
            found.append(certificate.observe({"a": value, "b": 1 - value}))
            if certificate.due:
                certificate.refreshed({"a": 0.7})
        return found

    def restored(certificate: Certificate) -> Certificate:
        plain: Mapping[str, object] = json.loads(json.dumps(certificate.to_plain()))
        return Certificate.from_plain(plain)

    whole, first = Certificate(), Certificate()
    both = steps(first, values[:cut])
    second = restored(first)
    assert steps(whole, values) == both + steps(second, values[cut:])
    assert second == whole
