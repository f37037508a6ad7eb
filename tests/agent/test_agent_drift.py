"""Drift: ADWIN against river's, the rules on numbers, and runs whose world changes or stays the same."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax

from edgetune.agent import checkpoint, loop
from edgetune.agent.config import AgentConfig
from edgetune.agent.drift.adwin import Adwin
from edgetune.agent.drift.config import DriftConfig
from edgetune.agent.drift.detector import Detector
from edgetune.agent.drift.drift import Drift, Finding
from edgetune.agent.feeder import Feeder
from edgetune.agent.ledger import Ledger, Sample
from edgetune.agent.quiet import losses_of
from edgetune.agent.view import QuietView
from edgetune.bundle import Array, Bundle
from edgetune.errors import DataError
from edgetune.telemetry import runlog
from tests.agent.fakes import CLASSES, Workshop, make_bundle, make_image
from tools import drift_study

GOLDEN = json.loads(Path(__file__).with_name("adwin.json").read_text())


# ---- the detector ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", range(len(GOLDEN["cases"])))
def test_the_detector_says_what_rivers_says(number: int) -> None:
    case = GOLDEN["cases"][number]
    detector = Adwin(case["delta"], case["clock"])
    found, widths = [], []
    for index, value in enumerate(GOLDEN["streams"][case["stream"]]):
        change = detector.update(value)
        widths.append(detector.width)
        if change is not None:
            assert change.values >= 5 and change.before != change.after
            found.append([index, pytest.approx(detector.mean, rel=1e-9)])
    assert widths == case["widths"] and found == case["changes"]
    assert detector.total == pytest.approx(case["total"], rel=1e-9)
    assert detector.variance == pytest.approx(case["variance"], rel=1e-9)


def test_a_detector_goes_on_from_its_plain_state() -> None:
    values = GOLDEN["streams"]["jumps"]
    whole, part = Adwin(0.002, 4), Adwin(0.002, 4)
    for number, value in enumerate(values):
        if number % 37 == 0:
            known = json.loads(json.dumps(part.to_plain()))
            part = Adwin(0.002, 4)
            part.from_plain(known)
        assert whole.update(value) == part.update(value)
    assert whole.to_plain() == part.to_plain() and len(json.dumps(whole.to_plain())) < 4000


def test_values_are_watched_in_units_of_their_noise() -> None:
    """The same stream, a thousand times larger or smaller, gives the same changes at the same places."""
    found = {}
    for scale in (1.0, 1e-3, 1e3):
        watched = Detector(0.002)
        changes = [watched.update(scale * value) for value in GOLDEN["streams"]["jumps"]]
        found[scale] = [
            (number, round(change.before / scale, 6), round(change.after / scale, 6), change.values)
            for number, change in enumerate(changes)
            if change is not None
        ]
    assert found[1.0] == found[1e-3] == found[1e3] and [after > before for _, before, after, _ in found[1.0]] == [
        True, False,
    ]  # fmt: skip
    still = Detector(0.002)
    assert all(still.update(0.0) is None for _ in range(50))


def test_the_study_runs() -> None:
    lines = drift_study.table(2, [4.0], 0.002)
    assert len(lines) == 2 + len(drift_study.NOISES) and all(line.startswith("| 4 σ |") for line in lines[2:])


# ---- the rules ------------------------------------------------------------------------------------------------------
def drive(drift: Drift, losses: list[float], energy: float = 0.9, kept_as: str = "a") -> list[Finding]:
    return [finding for loss in losses for finding in drift.stepped(loss, [energy], kept_as)]


def noisy(mean: float, count: int) -> list[float]:
    dice = random.Random(mean)
    return [mean + dice.gauss(0, 0.05) for _ in range(count)]


def test_a_loss_that_rises_is_drift_and_one_that_falls_is_not() -> None:
    drift = Drift(DriftConfig(actions=("notice", "recalibrate", "boost"), boost_steps=60))
    assert drive(drift, noisy(2.0, 60) + noisy(0.5, 60)) == [] and not drift.recalibration_due
    (found,) = drive(drift, noisy(2.0, 20))
    assert found.what == "the loss" and 0.4 < found.before < found.after
    assert found.actions == ("notice", "recalibrate", "boost") and drift.recalibration_due
    assert drift.rate_factor == 3.0
    drift.recalibrated()
    # Its own learning rate may be why the loss rises on: no more than a notice.
    (second,) = drive(drift, noisy(8.0, 25))
    assert second.actions == ("notice",) and not drift.recalibration_due
    drive(drift, noisy(8.0, 40))
    assert drift.rate_factor == 1.0


def test_energy_that_falls_is_drift_unless_the_plan_is_another() -> None:
    drift = Drift(DriftConfig())
    for _ in range(400):
        assert drift.stepped(1.0, [0.9, 0.94], "a") == []
    found = [finding for _ in range(200) for finding in drift.stepped(1.0, [0.7, 0.74], "a")]
    assert [finding.what for finding in found] == ["the captured energy"] and drift.recalibration_due
    other = Drift(DriftConfig())
    for _ in range(400):
        other.stepped(1.0, [0.92], "a")
    assert all(other.stepped(1.0, [0.72], "b") == [] for _ in range(200))
    assert all(other.stepped(1.0, [0.95], "b") == [] for _ in range(200))  # better is no drift
    assert all(other.stepped(1.0, [], "c") == [] for _ in range(3))


def test_quiet_comes_with_evaluations_that_gain_nothing() -> None:
    drift = Drift(DriftConfig(quiet_after=3))
    for accuracy in (0.5, 0.6, 0.6, None, 0.59):
        drift.evaluated(accuracy)
        assert not drift.quiet
    drift.evaluated(0.6)
    assert drift.quiet
    assert drift.rested(noisy(0.5, 100)) is None and drift.quiet
    assert drift.rested(noisy(3.0, 100)) is not None and not drift.quiet and drift.recalibration_due
    for _ in range(4):  # in another world less may be a gain
        drift.evaluated(0.3)
    assert drift.quiet
    drift.wake()
    assert not drift.quiet
    for _ in range(9):
        never = Drift(DriftConfig())
        never.evaluated(0.1)
        assert not never.quiet


def test_everything_goes_on_from_the_plain_state() -> None:
    config = DriftConfig(actions=("boost", "recalibrate"), boost_steps=7, quiet_after=4)
    whole, part = Drift(config), Drift(config)
    for number, loss in enumerate(noisy(0.5, 60) + noisy(2.0, 60)):
        if number % 11 == 0:
            known = json.loads(json.dumps(part.to_plain()))
            part = Drift(config)
            part.from_plain(known)
        for drift in (whole, part):
            drift.stepped(loss, [0.9 - number / 1000], "a")
            drift.evaluated(0.5)
        assert whole.to_plain() == part.to_plain() and whole.rate_factor == part.rate_factor
    part.from_plain({})  # of a checkpoint that had none
    assert part.to_plain() == Drift(config).to_plain()


def test_the_settings_are_checked() -> None:
    assert DriftConfig().check() == DriftConfig(actions=(), quiet_after=5).check() == []
    wrong = DriftConfig(("sing",), 1.5, float("nan"), 0, -1, 0.0, 0).check()
    assert len(wrong) == 7 and "boost, notice, recalibrate" in wrong[0]


def test_losses_are_cross_entropies() -> None:
    dice = np.random.default_rng(0)
    logits, labels = dice.normal(0, 50, (40, 7)).astype(np.float32), dice.integers(0, 7, 40)
    expected = -log_softmax(logits.astype(np.float64), axis=1)[np.arange(40), labels]
    np.testing.assert_allclose(losses_of(logits, labels), expected, rtol=1e-12, atol=1e-12)


# ---- runs -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def settings(tmp_path: Path, **changed: Any) -> AgentConfig:
    base: dict[str, Any] = {
        "data": tmp_path / "data", "state": tmp_path / "state", "batch": 4, "once": True, "quiet": True, "holdout": 0,
        "epsilon": 0.9, "settle_seconds": 0.1, "rescan_seconds": 0.1, "checkpoint_every": 5, "pause_seconds": 0.02,
    }  # fmt: skip
    return AgentConfig(**{**base, **changed})


def events(state: Path, *kinds: str) -> list[dict[str, Any]]:
    return [record for record in runlog.read(state / "log.jsonl") if record["event"] in kinds]


def world(folder: Path, seeds: range, turned: int = 0) -> None:
    """Add images; in a ``turned`` world the colours mean other classes."""
    for label in range(3):
        for seed in seeds:
            (folder / CLASSES[(label + turned) % 3]).mkdir(parents=True, exist_ok=True)
            made = make_image(folder.parent / "drawn" / f"{label}-{seed}.png", label, seed)
            made.rename(folder / CLASSES[(label + turned) % 3] / f"{turned}-{seed}.png")


def test_another_world_is_noticed_and_answered_and_a_resumed_run_does_the_same(tmp_path: Path, bundle: Bundle) -> None:
    drift = DriftConfig(actions=("notice", "recalibrate", "boost"), boost_steps=6)
    stops: dict[str, tuple[int | None, ...]] = {"whole": (None,), "parts": (66, 73, None)}
    for name, ends in stops.items():
        state, data = tmp_path / name, tmp_path / f"data-{name}"
        world(data, range(40))
        loop.run_agent(
            bundle,
            settings(tmp_path, state=state, data=data, drift=drift, epochs=2),
            parts=Workshop().parts(),
            view=QuietView(),
        )
        world(data, range(40, 80), turned=1)
        for end in ends:
            asked = settings(tmp_path, state=state, data=data, drift=drift, max_steps=end, checkpoint_every=10)
            loop.run_agent(bundle, asked, parts=Workshop().parts(), view=QuietView())
    (found,) = events(tmp_path / "whole", "drift")
    assert found["what"] == "the loss" and found["after"] > found["before"] and 60 < found["step"] < 70
    assert found["actions"] == ["notice", "recalibrate", "boost"]
    refreshed = events(tmp_path / "whole", "refresh")
    assert any("the world changed" in record["reason"] and record["step"] == found["step"] for record in refreshed)
    rates = [record["learning_rate"] for record in events(tmp_path / "whole", "step")]
    boosted = [number for number, rate in enumerate(rates, 1) if rate == pytest.approx(0.3)]
    assert boosted == list(range(found["step"] + 1, found["step"] + 7))
    ends_of = [checkpoint.load_newest(tmp_path / name, lambda path: None) for name in stops]
    one, other = ({name: value.tobytes() for name, value in found.tensors.items()} for found in ends_of if found)
    assert one == other
    drifts = [end.position["drift"] for end in ends_of if end]
    assert drifts[0] == drifts[1]


def test_a_quiet_run_lets_samples_wait_until_the_world_changes(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreadable, load = list[str](), Feeder.load

    def careful(feeder: Feeder, sample: Sample, *, to_train: bool = False) -> Array:
        if any(sample.path.endswith(name) for name in unreadable):
            raise DataError("missing")
        return load(feeder, sample, to_train=to_train)

    monkeypatch.setattr(Feeder, "load", careful)
    data, state = tmp_path / "data", tmp_path / "state"
    world(data, range(40))
    drift = DriftConfig(quiet_after=2, quiet_interval_s=0.05, quiet_backlog=30)
    asked = settings(tmp_path, once=False, holdout=5, drift=drift, checkpoint_every=3, max_steps=15)
    done: list[loop.Outcome] = []
    agent = threading.Thread(
        target=lambda: done.append(loop.run_agent(bundle, asked, parts=Workshop().parts(), view=QuietView()))
    )
    agent.start()
    _wait(lambda: events(state, "quiet"))
    quiet_at = events(state, "quiet")[0]["step"]
    assert quiet_at < 24 and checkpoint.listed(state)[0][0] == quiet_at  # 24 batches were there: some wait
    world(data, range(40, 50))
    _wait(lambda: len(events(state, "looked")) >= 2)
    unreadable.append("0-60.png")
    world(data, range(60, 61))
    _wait(lambda: len(events(state, "looked")) >= 3)
    assert not events(state, "quarantined"), "what still waits is not quarantined by a look at it"
    assert events(state, "state")[-1]["reason"].startswith("quiet: 2 evaluations without gain")
    waiting = Ledger(state / "ledger.sqlite", read_only=True).counts()["new"]
    assert waiting > 0 and events(state, "step")[-1]["step"] == quiet_at
    for begin in range(70, 130, 10):
        world(data, range(begin, begin + 10), turned=1)
        time.sleep(0.15)
        if events(state, "drift"):
            break
    agent.join(30)
    assert done and done[0].step == 15
    (found,) = events(state, "drift")[:1]
    assert found["what"] == "the loss of waiting samples" and found["step"] == quiet_at
    numbers = [record["step"] for record in events(state, "step")]
    assert all(later == earlier + 1 for earlier, later in pairwise(numbers))


def test_a_backlog_ends_a_quiet_time(tmp_path: Path, bundle: Bundle) -> None:
    data, state = tmp_path / "data", tmp_path / "state"
    world(data, range(20))
    drift = DriftConfig(quiet_after=1, quiet_interval_s=600, quiet_backlog=5)
    asked = settings(tmp_path, once=False, holdout=5, drift=drift, checkpoint_every=2, max_steps=24)
    done: list[loop.Outcome] = []
    agent = threading.Thread(
        target=lambda: done.append(loop.run_agent(bundle, asked, parts=Workshop().parts(), view=QuietView()))
    )
    agent.start()
    _wait(lambda: events(state, "quiet"))
    world(data, range(20, 60))
    agent.join(30)
    assert done and done[0].step == 24
    ended = events(state, "quiet_ended")
    assert ended and ended[0]["samples"] > 20


def _wait(done: Callable[[], Any], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not done() and time.monotonic() < until:
        time.sleep(0.02)
    assert done()
