"""Loads onnxruntime and runs a tiny graph on each provider that matters, in a process of its own.

``python -m edgetune.doctor.probe`` prints one JSON object: version, providers, for each provider tried an empty string
or the reason why it failed, and what CUDA's memory has free beside that. Apart, because a runtime for another machine
may not come back from this.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from edgetune.telemetry.cuda import CudaMemory, read_cuda

TRIED = ("CPUExecutionProvider", "CUDAExecutionProvider")


def _field(number: int, content: bytes | int) -> bytes:
    """Return one field of Protocol Buffers' wire format, of values below 128 and lengths below 128."""
    if isinstance(content, int):
        return bytes([number << 3, content])
    return bytes([number << 3 | 2, len(content)]) + content


def _tensor(name: str, shape: tuple[int, ...]) -> bytes:
    dims = b"".join(_field(1, _field(1, size)) for size in shape)
    return _field(1, name.encode()) + _field(2, _field(1, _field(1, 1) + _field(2, dims)))


def _node(operator: str, inputs: str, output: str) -> bytes:
    words = b"".join(_field(1, name.encode()) for name in inputs)
    return _field(1, words + _field(2, output.encode()) + _field(4, operator.encode()))


def tiny_model() -> bytes:
    """Return an ONNX model (opset 17, IR 8): y = Relu(Conv(x, w)), x of (1, 1, 3, 3), w of (1, 1, 3, 3).

    A convolution needs cuDNN, and Relu one of the runtime's own GPU kernels.
    """
    graph = _node("Conv", "xw", "c") + _node("Relu", "c", "y") + _field(2, b"tiny")
    graph += _field(11, _tensor("x", (1, 1, 3, 3))) + _field(11, _tensor("w", (1, 1, 3, 3)))
    graph += _field(12, _tensor("y", (1, 1, 1, 1)))
    # A graph is longer than 127 bytes, so its length takes two bytes.
    length = bytes([len(graph) & 127 | 128, len(graph) >> 7])
    return _field(1, 8) + bytes([7 << 3 | 2]) + length + graph + _field(8, _field(2, 17))


def tried(runtime: Any, provider: str) -> str:
    """Return why the tiny model does not run on ``provider``, in words; empty: it does, and is right."""
    import numpy as np

    options = runtime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = runtime.InferenceSession(tiny_model(), options, providers=[provider])
        if session.get_providers()[0] != provider:
            return f"the runtime fell back to {session.get_providers()[0]}"
        ones = np.ones((1, 1, 3, 3), np.float32)
        (result,) = session.run(None, {"x": ones, "w": 2 * ones})
    except Exception as error:  # whatever a runtime raises is the answer
        return " ".join(str(error).split())[:300]
    return "" if float(result.item()) == 18.0 else f"3 x 3 ones times 2 summed to {result.item()}, not 18"


def main() -> None:
    """Print what this Python's onnxruntime can do."""
    import onnxruntime

    providers = list(onnxruntime.get_available_providers())
    failed = {name: tried(onnxruntime, name) for name in TRIED if name in providers}
    memory = read_cuda() if TRIED[1] in providers else None
    cuda_bytes = (memory.free_bytes, memory.total_bytes) if isinstance(memory, CudaMemory) else None
    found = {"version": onnxruntime.__version__, "providers": providers, "failed": failed, "cuda_bytes": cuda_bytes}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
