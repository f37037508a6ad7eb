"""Loads a promoted file as a serving process would, and prints one JSON line about it.

Usage: run_serving.py MODEL.onnx INPUT.npy. Needs nothing but onnxruntime and numpy; no package of this project.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import onnxruntime


def main(model: str, sample: str) -> None:
    """Print the first output, what the file says of itself, and which libraries were loaded."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    first = session.run(None, {session.get_inputs()[0].name: np.load(sample)})[0]
    told = {
        "output": first.tolist(),
        "names": [value.name for value in session.get_outputs()],
        "metadata": session.get_modelmeta().custom_metadata_map,
        "onnx": "onnx" in sys.modules,
        "edgetune": "edgetune" in sys.modules,
    }
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
