"""One run over all tasks of a stream, by the real agent, in a process that has neither torch nor onnx.

Usage: continual_run.py JSON. The agent is run on one task after the other, on the same state directory; after each, the
weights of the newest checkpoint are judged on the test images of all tasks, as a plain ONNX file in stock onnxruntime.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edgetune.agent import checkpoint as checkpoints
from edgetune.agent.gate import onnxfile
from edgetune.agent.gate.gatekeeper import verdicts_of
from edgetune.agent.gate.manual import base_of, with_checkpoint
from edgetune.agent.gate.versions import Versions
from edgetune.agent.loop import run_agent
from edgetune.agent.settings import configured
from edgetune.agent.view import QuietView
from edgetune.bundle import Array, Bundle
from edgetune.engines.serving import ServedModel
from edgetune.planning.plan import Plan
from edgetune.telemetry import runlog


def run(told: dict[str, Any]) -> dict[str, Any]:
    """Return the accuracy matrix and the memory of the run that ``told`` describes.

    Keys of ``told``: bundle, tasks (a .npz with names, and train_i, train_labels_i, test_i, test_labels_i), work (an
    empty folder), config (as a config file has it).
    """
    bundle, work = Bundle.open(told["bundle"], verify=False), Path(told["work"])
    with np.load(told["tasks"]) as stored:
        arrays = {name: stored[name] for name in stored.files}
    names = [str(name) for name in arrays["names"]]
    data, state = work / "data", work / "state"
    data.mkdir(parents=True)
    config = configured({**told["config"], "data": str(data), "state": str(state), "once": True, "quiet": True})
    lines, matrix, promoted = list[str](), list[list[float]](), list[list[float]]()
    started = time.perf_counter()
    seconds = 0.0
    before: list[float] = []
    for task, name in enumerate(names):
        lines += _write(data, task, name, arrays[f"train_{task}"], arrays[f"train_labels_{task}"], bundle)
        (data / "metadata.jsonl").write_text("".join(lines))
        gc.collect()  # the session of the task before: else it is measured too
        begun = time.perf_counter()
        run_agent(bundle, config, view=QuietView())
        seconds += time.perf_counter() - begun
        if not before:
            before = _accuracies(_exported(bundle, work), arrays, len(names))
        matrix.append(_accuracies(_newest(state, work), arrays, len(names)))
        promoted.append(_accuracies(state / "promoted" / "model.onnx", arrays, len(names)))
    steps = runlog.steps(state / "log.jsonl")
    found = checkpoints.load_newest(state, lambda path: None)
    assert found is not None
    plan = Plan.from_json(found.position["plan"])
    return {
        "tasks": names, "matrix": matrix, "before": before, "promoted": promoted, "steps": len(steps),
        "measured_peak_bytes": max(step["measured_peak_bytes"] for step in steps),
        "saved_bytes": plan.saved_bytes, "epsilon": plan.epsilon, "trained": plan.trained,
        "energy": _mean([value for step in steps for value in step["energy"].values() if value is not None]),
        "train_seconds": round(seconds, 2), "seconds": round(time.perf_counter() - started, 2),
        "replay_bytes": sum(path.stat().st_size for path in (state / "replay").rglob("*") if path.is_file()),
    }  # fmt: skip


def _write(data: Path, task: int, name: str, images: Array, labels: Array, bundle: Bundle) -> list[str]:
    """Write the images of a task and return their lines of the metadata."""
    lines = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = f"{task}-{number:04d}.png"
        Image.fromarray(image).save(data / file)
        entry = {"file_name": file, "label": bundle.manifest.classes[int(label)], "task": name}
        lines.append(json.dumps(entry) + "\n")
    return lines


def _exported(bundle: Bundle, work: Path) -> Path:
    path = work / "exported.onnx"
    onnxfile.write_model(path, onnxfile.skeleton_of(bundle), onnxfile.inference_places(bundle), {})
    return path


def _newest(state: Path, work: Path) -> Path:
    found = checkpoints.load_newest(state, lambda path: None)
    assert found is not None
    base, path = base_of(Versions(state), str(found.position["bundle"])), work / "newest.onnx"
    onnxfile.write_model(path, base.skeleton, with_checkpoint(base, found.path), {})
    return path


def _accuracies(model: Path, arrays: dict[str, Array], tasks: int) -> list[float]:
    served, found = ServedModel(model), []
    for task in range(tasks):
        images, labels = arrays[f"test_{task}"], arrays[f"test_labels_{task}"]
        x = ((images.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5))[:, None]
        found.append(float(np.mean(np.array(verdicts_of(served.predict(x))) == labels)))
    return found


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(json.loads(sys.argv[1]))) + "\n")
