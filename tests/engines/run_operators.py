"""Measures how much memory single operators take in onnxruntime, with the options of a train graph.

Usage: run_operators.py BUNDLE FILE..., each FILE an ONNX graph; inputs called ``flag`` are boolean, and every input has
``SHAPE``. BUNDLE is any bundle. Prints one JSON object: per file, the high-water mark of one run above what was
resident before it, in units of one float32 tensor of ``SHAPE``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from edgetune.bundle import Bundle
from edgetune.engines.heap import return_memory_to_the_system
from edgetune.engines.onnxruntime import OnnxRuntime
from edgetune.telemetry.process import PeakMeter, resident_bytes

SHAPE = (4096, 4096)
UNIT_BYTES = 4 * SHAPE[0] * SHAPE[1]  # 64 MiB


def main(bundle: str, files: list[str]) -> None:
    """Measure the second run of every file: the first brings code into memory."""
    return_memory_to_the_system()
    options = OnnxRuntime(Bundle.open(bundle))._options("train")
    inputs = {"flag": np.full(SHAPE, True), "x": np.full(SHAPE, 0.5, np.float32)}
    meter, units = PeakMeter(), {}
    for file in files:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        feeds = {value.name: inputs[value.name] for value in session.get_inputs()}
        session.run(None, feeds)
        meter.reset()
        before_bytes = resident_bytes()
        session.run(None, feeds)
        units[Path(file).stem] = (meter.peak_bytes() - before_bytes) / UNIT_BYTES
    sys.stdout.write(json.dumps({"resettable": meter.resettable, "units": units}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
