"""Trains with Microsoft's training API. Runs in a process, and with an interpreter, that has onnxruntime-training.

Arguments: ``train ARTIFACTS DATA RESULT`` or ``gradients FORWARD DATA RESULT PARAMETER...``; DATA and RESULT are npz
files. Knows nothing of EdgeTune.
"""

from __future__ import annotations

import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

# onnxruntime/training/__init__.py imports torch, for optimizers that nobody here uses. A bare package in its place.
_package = types.ModuleType("onnxruntime.training")
_package.__path__ = [str(Path(onnxruntime.__file__).with_name("training"))]
sys.modules["onnxruntime.training"] = _package

from onnxruntime.training.api import CheckpointState, Module, Optimizer  # noqa: E402

TRAINING, EVAL, OPTIMIZER = "training_model.onnx", "eval_model.onnx", "optimizer_model.onnx"


def parameters(state: Any, kind: str) -> dict[str, Any]:
    """Return copies of all parameters, by kind, name, and whether they have a gradient."""
    return {f"{kind}/{'trained' if p.requires_grad else 'frozen'}/{n}": p.data.copy() for n, p in state.parameters}


def gradients(state: Any, kind: str) -> dict[str, Any]:
    """Return copies of all accumulated gradients."""
    return {f"{kind}/{n}": p.grad.copy() for n, p in state.parameters if p.requires_grad}


def batches(data: Any) -> list[tuple[Any, Any]]:
    return [(data[f"x{i}"], data[f"y{i}"]) for i in range(len(data.files) // 2)]


def train(root: Path, data: list[tuple[Any, Any]], scratch: Path) -> dict[str, Any]:
    """Load the artifacts, do one step per batch, save, load again; return all that was seen on the way."""
    state = CheckpointState.load_checkpoint(root / "checkpoint")
    module = Module(root / TRAINING, state, root / EVAL)
    optimizer = Optimizer(root / OPTIMIZER, module)
    optimizer.set_learning_rate(state.properties["edgetune.learning_rate"])
    seen = {"inputs": np.array(module.input_names()), "batch": np.array(state.properties["edgetune.batch"])}
    seen |= parameters(state, "initial")
    losses = []
    for index, (x, y) in enumerate(data):
        losses.append(float(module(x, y)))
        if index == 0:
            seen |= gradients(state, "gradient")
        optimizer.step()
        module.lazy_reset_grad()
    seen["losses"] = np.array(losses)
    seen |= parameters(state, "final")
    x, y = data[0]
    module(x, y)
    module(x, y)  # the second adds to the first
    seen |= gradients(state, "doubled")
    seen["eval.loss"], seen["eval.logits"] = module.eval()(x, y)
    exported = root / "inference.onnx"  # here, because it may point to weights in a file beside it
    module.export_model_for_inferencing(exported, ["output"])
    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    seen["inference.inputs"] = np.array([value.name for value in session.get_inputs()])
    seen["inference.logits"] = session.run(["output"], {session.get_inputs()[0].name: x})[0]
    CheckpointState.save_checkpoint(state, scratch / "saved", include_optimizer_state=True)
    seen |= parameters(CheckpointState.load_checkpoint(scratch / "saved"), "again")
    return seen


def own_gradients(forward: Path, x: Any, y: Any, wanted: list[str], scratch: Path) -> dict[str, Any]:
    """Return the gradients of the cross-entropy by the gradient graph that Microsoft derives from ``forward``."""
    import onnx
    from onnxruntime.training import artifacts

    artifacts.generate_artifacts(
        onnx.load(forward), requires_grad=wanted, loss=artifacts.LossType.CrossEntropyLoss, artifact_directory=scratch
    )
    state = CheckpointState.load_checkpoint(scratch / "checkpoint")
    module = Module(scratch / TRAINING, state, scratch / EVAL)
    return {"loss": module(x, y), **gradients(state, "gradient")}


def main(command: str, source: str, data: str, result: str, *names: str) -> None:
    pairs = batches(np.load(data))
    with tempfile.TemporaryDirectory() as scratch:
        if command == "train":
            seen = train(Path(source), pairs, Path(scratch))
        else:
            seen = own_gradients(Path(source), *pairs[0], list(names), Path(scratch))
    np.savez(result, **seen)
    sys.stdout.write("null\n")  # what in_fresh_process reads


if __name__ == "__main__":
    main(*sys.argv[1:])
