"""Write tests/agent/adwin.json: what river's ADWIN says of a few streams, at every value. Needs the package river.

python tools/adwin_golden.py
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).resolve().parent.parent / "tests" / "agent" / "adwin.json"


def streams() -> dict[str, list[float]]:
    """Return streams that jump, creep, stay, and are of zeros and ones."""
    dice = np.random.default_rng(7)
    made = {
        "jumps": np.concatenate([dice.normal(mean, 0.1, 200) for mean in (0.3, 0.8, 0.2)]),
        "answers": np.concatenate([dice.random(300) < 0.2, dice.random(300) < 0.6]).astype(float),
        "creeps": np.linspace(0, 3, 500) + dice.normal(0, 0.2, 500),
        "stays": dice.normal(1, 0.5, 400),
        "a loss": 2.3 * np.exp(-np.arange(500) / 60) + 0.3 + dice.normal(0, 0.1, 500),
    }
    return {name: np.round(values, 3).tolist() for name, values in made.items()}


def main() -> None:
    """Write the file."""
    river: Any = importlib.import_module("river.drift")
    cases = []
    for name, values in streams().items():
        for delta, clock in ((0.002, 1), (0.002, 32), (0.05, 4)):
            detector = river.ADWIN(delta=delta, clock=clock)
            widths, found = [], []
            for number, value in enumerate(values):
                detector.update(value)
                widths.append(int(detector.width))
                if detector.drift_detected:
                    found.append([number, detector.estimation])
            end = {"total": detector.total, "variance": detector.variance}
            cases.append({"stream": name, "delta": delta, "clock": clock, "widths": widths, "changes": found, **end})
    version = importlib.metadata.version("river")
    FILE.write_text(json.dumps({"river": version, "streams": streams(), "cases": cases}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
