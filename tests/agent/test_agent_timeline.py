"""What the run log says of a plan's phases: predicted, and measured between the calls of a session."""

from __future__ import annotations

import json

import edgetune
from edgetune.agent.timeline import PhasePeaks, timeline_fields
from edgetune.planning.plan import make_plan
from edgetune.units import MIB
from tests.engines.workshop import SMALL, bundle_of, samples


class Readings:
    """A meter that reads one number after the other."""

    resettable: bool | None = True

    def __init__(self, *values: int) -> None:
        self.values, self.resets = list(values), 0

    def reset(self) -> None:
        self.resets += 1

    def peak_bytes(self) -> int:
        return self.values.pop(0)


def test_every_phase_of_a_step_is_measured_apart() -> None:
    bundle = bundle_of("hosvd")
    plan = make_plan(bundle.manifest, batch=8, calibration=None, epsilon=1.0, runtime_bytes=0)
    session = edgetune.TrainingSession(bundle, plan, verify=False)
    meter = Readings(3, 7, 5, 4, 9)
    peaks = PhasePeaks(meter)
    session.phase_ended = peaks.ended
    peaks.begin()
    x, y = samples(8, SMALL)
    features = list(session.features(x))
    peaks.ended("trunk")
    session.step_features(features, y)
    assert peaks.measured_bytes == {"trunk": 3, "train": 7, "update": 5} and peaks.step_bytes == 7
    assert meter.resets == 4
    peaks.ended("trunk")
    peaks.ended("trunk")
    assert peaks.measured_bytes["trunk"] == 9, "the most of several runs"
    peaks.begin()
    assert peaks.step_bytes == 0


def test_the_event_adds_up_to_the_plan() -> None:
    manifest = bundle_of("hosvd", "large", last=5).manifest
    plan = make_plan(manifest, batch=16, calibration=None, epsilon=1.0, runtime_bytes=80 * MIB, correction_bytes=-MIB)
    fields = timeline_fields(manifest, plan, 80 * MIB, {"train": 150 * MIB})
    assert json.loads(json.dumps(fields)) == fields
    phases = fields["phases"]
    assert list(phases) == ["trunk", "train", "update"]
    assert max(phase["predicted_bytes"] for phase in phases.values()) == plan.predicted_peak_bytes
    for phase in phases.values():
        parts = fields["fixed_bytes"] + phase["saved_bytes"] + phase["transient_bytes"] - MIB
        assert parts == phase["predicted_bytes"]
    assert phases["train"]["saved_bytes"] > 0 == phases["update"]["saved_bytes"]
    assert f"train/{phases['train']['node']}" == plan.bottleneck
    assert (phases["train"]["measured_bytes"], phases["update"]["measured_bytes"]) == (150 * MIB, None)
