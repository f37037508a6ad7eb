"""What a process takes before anything of a plan is in memory. Knows engines, planner and the process's meter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from edgetune.bundle import Bundle
from edgetune.engines.calibration import calibrate
from edgetune.engines.session import TrainingSession
from edgetune.errors import EngineError
from edgetune.planning.plan import make_plan
from edgetune.telemetry.process import resident_bytes


def measure_runtime(bundle: Bundle, engine: str = "auto") -> int:
    """Return the resident bytes of this process beyond what the plan's ledger counts for itself.

    Every graph is run once on one sample of zeros: code and tables of a runtime come into memory when they are first
    used, not when they are loaded.
    """
    plan = make_plan(bundle.manifest, batch=1, calibration=None, epsilon=1.0, runtime_bytes=0)
    session = TrainingSession(bundle, plan, engine=engine)  # verified, as the agent's own session is
    specs, targets = bundle.manifest.inputs, bundle.manifest.targets
    features = list(session.features({spec.name: np.zeros((1, *spec.shape), spec.dtype) for spec in specs}))
    session.predict_features(features)
    calibrate(session, bundle.manifest, [tuple(features)])
    session.step_features(features, np.zeros((1, *targets.shape), targets.dtype))
    counted = ("weights", "parameters", "optimizer", "bases")
    return max(0, resident_bytes() - sum(plan.ledger[line] for line in counted))


def measure_runtime_apart(bundle: Bundle, engine: str = "auto") -> int:
    """Return what :func:`measure_runtime` finds in a new process, whatever this one holds already.

    Raises:
        EngineError: the process failed; its own words are in the message.
    """
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "edgetune.agent.baseline", str(bundle.path.resolve()), engine]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    if done.returncode != 0:
        raise EngineError(f"the runtime could not be measured: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    sys.stdout.write(f"{measure_runtime(Bundle.open(sys.argv[1], verify=False), sys.argv[2])}\n")
