"""One plan, fine-tuned in a process of its own: accuracy on held-out data, peak of a step, what is kept for it.

Knows a bundle, a plan and features on disk; nothing of where they came from.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import edgetune
from edgetune.bundle import Array
from edgetune.planning.plan import Plan
from edgetune.planning.spectra import Calibration
from edgetune.telemetry.process import PeakMeter, resident_bytes
from tools import codec_memory

STREAM, STREAM_LABELS, TEST, TEST_LABELS, INPUTS = "stream", "stream_labels", "test", "test_labels", "inputs"
_MEASURED_STEPS = range(1, 7)  # the first step brings code and tables into memory
_PREDICTED_AT_ONCE = 64


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: the same for every plan. ``seed`` is that of the order of samples."""

    steps: int
    batch: int
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What one plan gave.

    Attributes:
        before, after: shares of right answers on the test features, before and after fine-tuning.
        peak_bytes: the most that a step (train and update) took above what was resident before its features were
            there: the process's own high-water mark, reset for every step; the largest of six steps.
        held_bytes: in use after the forward pass, above what was in use with the targets alone (glibc's count).
        energy: the least captured energy of any tensor, mean over the steps; None: nothing is lost.
        refreshes: how often the energy certificate asked for new bases.
    """

    before: float
    after: float
    peak_bytes: int
    held_bytes: int
    energy: float | None
    refreshes: int


def fine_tune(folder: Path, plan_folder: Path, engine: str, schedule: Schedule) -> Outcome:
    """Train the plan in ``plan_folder`` of the bundle ``folder / "bundle"`` on the stream, and judge it by the test.

    Raises:
        EdgeTuneError: the bundle or the plan is damaged, or there is no such engine.
    """
    bundle = edgetune.open_bundle(folder / "bundle")
    plan = Plan.from_json((plan_folder / codec_memory.PLAN).read_text())
    if (plan_folder / codec_memory.CALIBRATION).exists():
        plan = dataclasses.replace(plan, calibration=Calibration.load(plan_folder / codec_memory.CALIBRATION))
    hyper = {"learning_rate": schedule.learning_rate, "clip_norm": 1.0}
    session = edgetune.TrainingSession(bundle, plan, engine=engine, hyper=hyper, verify=False)
    stream, labels = _features(folder, STREAM), np.load(folder / f"{STREAM_LABELS}.npy")
    before = _accuracy(session, folder)
    based = any(label.split(":")[0] == "hosvd" for label in plan.selection.values())
    certificate = edgetune.Certificate()
    certificate.restart(session.promises)
    meter, peaks, energies = PeakMeter(), list[int](), list[float]()
    refreshes, batches = 0, order(len(labels), schedule)
    for step, chosen in enumerate(batches):
        if step in _MEASURED_STEPS:
            codec_memory.settle(session)
            resident = resident_bytes()
        features = [feature[chosen] for feature in stream]
        meter.reset()
        session.step_features(features, labels[chosen])
        if step in _MEASURED_STEPS:
            peaks.append(meter.peak_bytes() - resident)
        energies.append(min(session.report.energy.values(), default=1.0))
        certificate.observe(session.report.energy)
        if based and certificate.due:
            recent = np.concatenate(batches[max(0, step - 1) : step + 1])
            session.refresh([np.load(folder / f"{INPUTS}.npy", mmap_mode="r")[recent]])
            certificate.refreshed(session.promises)
            refreshes += 1
    after = _accuracy(session, folder)
    lossy = bool(session.report.energy)
    held = codec_memory.after_forward(session, folder)  # last, because it takes the session apart
    return Outcome(before, after, max(peaks), held, float(np.mean(energies)) if lossy else None, refreshes)


def order(samples: int, schedule: Schedule) -> list[Array]:
    """Return the indices of every step's batch: all samples in a new order, again and again; none ends half-way."""
    rng = np.random.default_rng((schedule.seed, 3))
    per_pass = samples // schedule.batch
    passes = -(-schedule.steps // per_pass)
    batches = [piece for _ in range(passes) for piece in rng.permutation(samples)[: per_pass * schedule.batch].reshape(
        per_pass, schedule.batch)]  # fmt: skip
    return batches[: schedule.steps]


def write_features(folder: Path, name: str, arrays: tuple[Array, ...]) -> None:
    """Write the trunk's outputs for :func:`fine_tune`."""
    for index, array in enumerate(arrays):
        np.save(folder / f"{name}-{index}.npy", array)


def _features(folder: Path, name: str) -> list[Array]:
    return [np.load(file) for file in sorted(folder.glob(f"{name}-*.npy"))]


def _accuracy(session: edgetune.TrainingSession, folder: Path) -> float:
    features, labels = _features(folder, TEST), np.load(folder / f"{TEST_LABELS}.npy")
    right = 0
    for first in range(0, len(labels), _PREDICTED_AT_ONCE):
        some = slice(first, first + _PREDICTED_AT_ONCE)
        right += int((session.predict_features([f[some] for f in features]).argmax(1) == labels[some]).sum())
    return right / len(labels)
