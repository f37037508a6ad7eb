"""Microsoft's training API in a worker, with the interpreter that has it. Knows onnxruntime-training and numpy.

It gets the tail alone: the same step from the same features as everyone else, and no trunk inside.
"""

from __future__ import annotations

import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from tools.bench.processes import peak_of, processor_seconds, save_gradients

# onnxruntime/training/__init__.py imports torch, for optimizers that nobody here uses. A bare package in its place.
_package = types.ModuleType("onnxruntime.training")
_package.__path__ = [str(Path(onnxruntime.__file__).with_name("training"))]
sys.modules["onnxruntime.training"] = _package

ARTIFACTS, FEATURES = "ort-training", "ort-training.npz"


class OrtTraining:
    """A module and an optimizer that do one thing at a time when told."""

    def __init__(self, cell: Path) -> None:
        """Load what ``prepare`` left in ``cell``."""
        onnxruntime.set_default_logger_severity(3)  # it warns in every step of the shape of its own output
        from onnxruntime.training.api import CheckpointState, Module, Optimizer

        root = cell / ARTIFACTS
        self._cell = cell
        self._state = CheckpointState.load_checkpoint(root / "checkpoint")
        self._module = Module(root / "training_model.onnx", self._state, root / "eval_model.onnx")
        self._optimizer = Optimizer(root / "optimizer_model.onnx", self._module)
        self._optimizer.set_learning_rate(0.0)
        self._given = self._load()

    def _load(self) -> list[Any]:
        with np.load(self._cell / FEATURES) as stored:
            y, *features = (stored[f"arr_{i}"] for i in range(len(stored.files)))
        return [*features, y]

    def step(self) -> dict[str, float]:
        """Do one step from the features, and return its seconds."""
        return self._step(self._given)

    def _step(self, given: list[Any]) -> dict[str, float]:
        used, begin = processor_seconds(), time.perf_counter()
        self._module(*given)
        trained = time.perf_counter()
        self._optimizer.step()
        self._module.lazy_reset_grad()
        end = time.perf_counter()
        seconds = {"step": end - begin, "train": trained - begin, "update": end - trained}
        return {**seconds, "processor": processor_seconds() - used}

    def peak(self) -> dict[str, int]:
        """Return the peak of a step, see ``peak_of``."""
        self._given = []
        found = peak_of(self._load, self._step)
        self._given = self._load()
        return found

    def gradients(self, file: str) -> dict[str, Any]:
        """Write the gradients of the batch to ``file``; return the loss."""
        self._module.lazy_reset_grad()
        loss = float(self._module(*self._given))
        made = {name: value.grad.copy() for name, value in self._state.parameters if value.requires_grad}
        save_gradients(file, made)
        self._module.lazy_reset_grad()
        return {"loss": loss}

    def phases(self) -> dict[str, float]:
        """Nothing: the API runs forward and backward pass as one."""
        return {}

    def saved(self) -> dict[str, Any]:
        """Nothing: the runtime plans its memory itself, and does not tell."""
        return {}

    def trunk(self) -> dict[str, float]:
        """Nothing: it got the tail alone."""
        return {}

    def held(self) -> dict[str, Any]:
        """Nothing, for the same reason as ``saved``."""
        return {}
