"""A plain ONNX file in stock onnxruntime, as a serving process loads it. onnxruntime is imported when one is opened."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgetune.bundle import Array
from edgetune.engines.onnxruntime import import_onnxruntime
from edgetune.errors import EngineError


class ServedModel:
    """The model in the file ``path``; ``shape`` is that of one sample of its only input.

    Raises:
        EngineError: there is no onnxruntime, or it cannot load the file, or the model has several inputs.
    """

    def __init__(self, path: Path) -> None:
        runtime = import_onnxruntime()
        try:
            self._session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has no common class for what it raises
            raise EngineError(f"onnxruntime cannot load {path}: {error}") from None
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise EngineError(f"{path} has {len(inputs)} inputs; a source of samples gives one")
        self._input: str = inputs[0].name
        self.shape = tuple(int(extent) for extent in inputs[0].shape[1:])
        self._output: str = self._session.get_outputs()[0].name

    def predict(self, x: Array) -> Array:
        """Return the first output [b, ...] for the samples ``x`` [b, ...]."""
        found: Array = self._session.run([self._output], {self._input: np.ascontiguousarray(x)})[0]
        return found
