"""Runs the real agent in a process of its own and prints one JSON line about it.

Usage: run_real.py JSON, with the keys bundle and config (as a config file has it). Needs nothing but what a device has.
Printed: the outcome, or the error with its exit code; which of the host's libraries were loaded; the Python version.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from edgetune.agent.loop import run_agent
from edgetune.agent.settings import configured
from edgetune.bundle import Bundle
from edgetune.errors import BudgetError, EdgeTuneError

HOST_LIBRARIES = ("torch", "onnx", "onnxscript", "sklearn", "scipy")


def main() -> None:
    """Run as told by the first argument."""
    told = json.loads(sys.argv[1])
    result: dict[str, Any] = {"error": None}
    try:
        outcome = run_agent(Bundle.open(told["bundle"]), configured(told["config"]))
        result |= {"step": outcome.step, "accuracy": outcome.accuracy, "reason": outcome.reason}
    except EdgeTuneError as error:
        result |= {"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
        if isinstance(error, BudgetError):
            result["least_bytes"] = error.least_bytes
    result["host_libraries"] = [name for name in HOST_LIBRARIES if name in sys.modules]
    result["python"] = list(sys.version_info[:2])
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
