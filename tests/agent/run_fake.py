"""Runs the agent with the fake session in a process of its own, so that a test can kill it.

Usage: run_fake.py JSON, with the keys bundle, config (settings of a run), and one or none of
    kill_at_sync: die by SIGKILL instead of making the n-th fsync or rename of the process (1-based)
    step_seconds: make every step take this long
    file_limit: [step, bytes]: from this step on no file may grow beyond this size
    poison_after: the poisoned image is harmless until so many steps are made
Prints the outcome as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from edgetune.agent.loop import run_agent
from edgetune.agent.settings import configured
from edgetune.bundle import Array, Bundle
from edgetune.errors import EdgeTuneError
from tests.agent.fakes import FakeSession, Workshop


def die_at(number: int) -> None:
    """Count fsync and rename calls together and die at the ``number``-th."""
    calls = 0

    def counted(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    os.fsync, os.replace, os.rename = counted(os.fsync), counted(os.replace), counted(os.rename)


def poison_after(steps: int) -> None:
    """Let the fake session see grey in the place of poison during the first ``steps``."""
    gradient = FakeSession._gradient

    def late(self: FakeSession, x: Array, y: Array) -> tuple[float, Array, int, float]:
        poisoned = np.all(np.isclose(x.mean(axis=(2, 3)), [1, -1, 1]), axis=1)
        return gradient(self, np.where(poisoned[:, None, None, None] & (self.step_number < steps), 0.5, x), y)

    FakeSession._gradient = late  # type: ignore[method-assign]


def main() -> int:
    """Run as told by the first argument; return the exit code."""
    told = json.loads(sys.argv[1])

    def on_step(session: FakeSession) -> None:
        if told.get("step_seconds"):
            time.sleep(told["step_seconds"])
        if told.get("file_limit") and session.step_number == told["file_limit"][0]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (told["file_limit"][1], resource.RLIM_INFINITY))

    config = configured(told["config"])
    if told.get("poison_after"):
        poison_after(told["poison_after"])
    if told.get("kill_at_sync"):
        die_at(told["kill_at_sync"])
    try:
        outcome = run_agent(Bundle.open(told["bundle"]), config, parts=Workshop(on_step=on_step).parts())
    except EdgeTuneError as error:
        sys.stderr.write(str(error))
        return error.exit_code
    sys.stdout.write(json.dumps({"step": outcome.step, "accuracy": outcome.accuracy, "reason": outcome.reason}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
