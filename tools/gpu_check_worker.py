"""One contender of ``tools/gpu_check.py``, in a process that has done nothing before: prints one JSON line.

Usage: gpu_check_worker.py FOLDER CONTENDER DEVICE SECONDS; FOLDER is what ``tools.gpu_check.prepare`` wrote, CONTENDER
``pytorch`` or ``<engine>/<codec>``. Seconds are of a whole step, from a batch on the host to updated parameters. Bytes
are of the allocator of the device: torch's on CUDA, the process's high-water mark on a CPU.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import edgetune  # noqa: E402 - the path comes first
from edgetune.bundle import Array  # noqa: E402
from edgetune.errors import EngineError  # noqa: E402
from edgetune.planning.plan import Plan, predict  # noqa: E402
from edgetune.planning.selection import default_selection, settle  # noqa: E402
from edgetune.planning.spectra import Calibration  # noqa: E402
from edgetune.telemetry.process import PeakMeter, resident_bytes  # noqa: E402

_FEWEST, _MOST = 3, 50


class Meter:
    """The most bytes at once on ``device`` since :meth:`reset`; ``now`` is what is in use."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self._process = PeakMeter()

    def now(self) -> int:
        """Return the bytes in use."""
        return int(torch.cuda.memory_allocated()) if self.cuda else resident_bytes()

    def reset(self) -> None:
        """Begin anew."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            self._process.reset()

    def peak(self) -> int:
        """Return the most bytes in use at once."""
        return int(torch.cuda.max_memory_allocated()) if self.cuda else self._process.peak_bytes()

    def reserved(self) -> int | None:
        """Return the most bytes that torch's allocator held of the device; None on a CPU."""
        return int(torch.cuda.max_memory_reserved()) if self.cuda else None

    def device(self) -> int | None:
        """Return the bytes of the device that are taken, by whomever; None on a CPU."""
        if not self.cuda:
            return None
        free, total = torch.cuda.mem_get_info()
        return int(total - free)


def seconds_of(step: Callable[[], Any], seconds: float) -> list[float]:
    """Return the duration of each of some steps that together take ``seconds``; two before them are not counted."""
    for _ in range(2):
        step()
    found: list[float] = []
    while len(found) < _FEWEST or (sum(found) < seconds and len(found) < _MOST):
        begin = time.perf_counter()
        step()
        found.append(time.perf_counter() - begin)
    return found


def pytorch(folder: Path, device: str, x: Array, y: Array, seconds: float) -> dict[str, Any]:
    """Measure ordinary fine-tuning: the same trained tensors, everything else frozen, batch-norm in evaluation mode."""
    from tools import models

    bundle = edgetune.open_bundle(folder / "dense")
    trained = {spec.name for spec in bundle.manifest.parameters}
    model = getattr(models, json.loads((folder / "subject.json").read_text("utf-8"))["model"])().to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    tuned = [p for p in model.parameters() if p.requires_grad]
    if len(tuned) != len(trained):
        raise EngineError(f"the bundle trains {len(trained)} tensors, of which the model has {len(tuned)}")
    optimizer = torch.optim.SGD(tuned, lr=1e-4, momentum=0.9)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        inputs, labels = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
        loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(loss.detach())

    meter = Meter(device)
    times = seconds_of(step, seconds)
    optimizer.zero_grad(set_to_none=True)
    standing = meter.now()
    meter.reset()
    step()
    return {"seconds": times, "step_bytes": meter.peak() - standing, "reserved_bytes": meter.reserved()}


def ours(folder: Path, contender: str, device: str, x: Array, y: Array, seconds: float) -> dict[str, Any]:
    """Measure a session; its memory is that of a step from features, which is what a plan's peaks are of."""
    engine, codec = contender.split("/")
    bundle = edgetune.open_bundle(folder / codec)
    plan = Plan.from_json((folder / f"{codec}.json").read_text("utf-8"))
    if (folder / f"{codec}.safetensors").is_file():
        plan = dataclasses.replace(plan, calibration=Calibration.load(folder / f"{codec}.safetensors"))
    meter = Meter(device)
    taken = meter.device()
    session = edgetune.TrainingSession(bundle, plan, engine=engine, hyper={"learning_rate": 1e-4})
    phases: list[dict[str, float]] = []

    def step() -> None:
        session.step(x, y)
        phases.append(dict(session.report.seconds))

    times = seconds_of(step, seconds)
    counted = phases[-len(times) :]
    standing = meter.now()
    features = list(session.features(x))
    meter.reset()
    session.step_features(features, y)
    used = meter.device()
    if taken is not None and used is not None and used - taken < sum(v.nbytes for v in session.parameters().values()):
        raise EngineError(f"{engine} has put nothing on the CUDA device: it fell back to the CPU")
    settled = settle(bundle.manifest, default_selection(bundle.manifest) | dict(plan.selection))
    peaks = predict(settled, batch=plan.batch, micro_batch=plan.micro_batch, ranks=plan.ranks, runtime_bytes=0).peaks
    # torch's allocator knows nothing of what onnxruntime takes of a CUDA device.
    seen = not (meter.cuda and engine == "onnxruntime")
    return {
        "seconds": times,
        "phases": {name: statistics.median(phase[name] for phase in counted) for name in counted[0]},
        "step_bytes": meter.peak() - standing if seen else None,
        "reserved_bytes": meter.reserved() if seen else None,
        "device_bytes": None if used is None or taken is None else used - taken,
        "predicted_bytes": max(peaks[graph].bytes for graph in ("train", "update")),
        "saved_bytes": plan.saved_bytes,
        "gradient_norm": session.report.gradient_norm,
    }


def main(folder: Path, contender: str, device: str, seconds: float) -> None:
    """Measure and print."""
    with np.load(folder / "batch.npz") as stored:
        x, y = stored["x"], stored["y"]
    run = (
        pytorch(folder, device, x, y, seconds)
        if contender == "pytorch"
        else ours(folder, contender, device, x, y, seconds)
    )
    print(json.dumps(run))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4]))
