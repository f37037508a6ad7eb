"""Measures training steps in a process that has done nothing before, and prints one JSON line.

Usage: run_step.py FOLDER, which holds bundle/, plan.json, calibration.safetensors and features.npz (the targets first).
The peak is the high-water mark of the process over one whole step, reset just before it; ``before`` is what is resident
once everything that is always there has been used, and before the features are in memory.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from edgetune.bundle import Bundle
from edgetune.engines.pieces import slices
from edgetune.engines.session import TrainingSession
from edgetune.planning.plan import Plan, predict
from edgetune.planning.spectra import Calibration
from edgetune.telemetry.process import PeakMeter, resident_bytes

STEPS = 2


class Metered(TrainingSession):
    """A session that reads the high-water mark at the end of each graph of a step."""

    def __init__(self, bundle: Bundle, plan: Plan) -> None:
        self.meter, self.peaks_bytes = PeakMeter(), dict[str, list[int]]()
        super().__init__(bundle, plan)

    def _update(self, gradients: Mapping[str, Any]) -> float:
        norm = super()._update(gradients)
        self.peaks_bytes.setdefault("update", []).append(self.meter.peak_bytes())
        return norm


def main(folder: Path) -> None:
    """Measure ``STEPS`` steps."""
    bundle = Bundle.open(folder / "bundle")
    plan = Plan.from_json((folder / "plan.json").read_text())
    plan = dataclasses.replace(plan, calibration=Calibration.load(folder / "calibration.safetensors"))
    peaks = predict(
        bundle.manifest, batch=plan.batch, micro_batch=plan.micro_batch, ranks=plan.ranks, runtime_bytes=0,
        tail_micro_batch=plan.tail_micro_batch, memory=plan.memory,
    ).peaks  # fmt: skip
    session = Metered(bundle, plan)
    # Code and tables come into memory when they are first used, here for one sample.
    few = list(session.features(np.zeros((1, *bundle.manifest.inputs[0].shape), np.float32)))
    session.step_features(few, np.zeros(1, np.int64))
    del few
    session.set_plan(plan)  # else a block would be laid out for one sample
    session.peaks_bytes.clear()
    before_bytes = resident_bytes()
    for _ in range(STEPS):
        for place in slices(plan.batch, plan.tail_micro_batch):
            with np.load(folder / "features.npz") as stored:
                y, *features = (stored[f"arr_{i}"][place].copy() for i in range(1 + len(bundle.manifest.features)))
            session.meter.reset()
            session.add(features, y)
            session.peaks_bytes.setdefault("train", []).append(session.meter.peak_bytes())
        session.meter.reset()
        session.finish()
    result = {
        "resettable": session.meter.resettable,
        "measured": {graph: max(found) - before_bytes for graph, found in session.peaks_bytes.items()},
        "train_bytes": max(peaks[name].bytes for name in ("train", "accumulate") if name in peaks),
        "update_bytes": peaks["update"].bytes,
        "after_bytes": resident_bytes() - before_bytes,
        "seconds": sum(session.report.seconds.values()),
        "energy": session.report.energy,
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
