"""What a process takes before anything of a plan is in memory. Knows engines, planner and the process's meter."""

from __future__ import annotations

import gc
import hashlib
import importlib
import importlib.metadata
import io
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np

from edgetune.agent.parts import real_meter
from edgetune.agent.service.exporter import Exporter
from edgetune.agent.service.numbers import Numbers
from edgetune.agent.storage import write_atomic
from edgetune.agent.timeline import PhasePeaks
from edgetune.bundle import Bundle, Manifest
from edgetune.engines import heap
from edgetune.engines.calibration import calibrate
from edgetune.engines.choice import choose_engine
from edgetune.engines.session import TrainingSession
from edgetune.errors import EngineError, MemoryExhaustedError, StorageError
from edgetune.planning.plan import make_plan
from edgetune.planning.prediction import full_basis_bytes, predict
from edgetune.planning.rebase import settled_for
from edgetune.units import MIB

# What a run imports beside engine and planner; some of it only when it is first used.
_AGENT = ("edgetune.agent.loop", "rich.live", "rich.panel", "rich.progress_bar", "rich.table")
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "torch", "numpy", "onnx")
_METRICS = "metrics"
_MEASURE = 4
"""Counts up when what is measured changes: figures remembered before do not hold then."""
TORCH_SAMPLES, TORCH_EPSILON = 16, 0.25
"""On so many samples and at this ε the torch engine is measured: it takes more per sample, and per byte of a factor,
than is predicted. Less would put large batches too low, and more, small and compressed ones too high (see
docs/memory.md)."""


def runtime_bytes(bundle: Bundle, engine: str = "auto", *, metrics: bool = False) -> int:
    """Return the figure by which ``edgetune plan`` and ``edgetune run`` both plan, measured once and remembered.

    Two processes that do the same differ by some 0.3 MiB in what they hold (which pages of a library were touched,
    where the heap ends). So a budget that one of them names as the least might be refused by the next. The figure is
    therefore measured in a process of its own, rounded up to a whole MiB (by a quarter at least), and kept in
    ``$XDG_CACHE_HOME/edgetune`` (``~/.cache/edgetune``) per bundle, engine, versions and number of
    processors. Where nothing can be written there it is measured anew each time, and only the rounding is left.

    Args:
        metrics: with an endpoint for monitors, its library and its thread.

    Raises:
        EngineError: the measuring process failed.
    """
    known = remembered_bytes(bundle, engine, metrics=metrics)
    if known is not None:
        return known
    file = _file(bundle, engine, metrics)
    found = -(-(measure_runtime_apart(bundle, engine, metrics=metrics) + MIB // 4) // MIB) * MIB
    note = {"runtime_bytes": found, "bundle": bundle.digest, "engine": choose_engine(engine).name}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(note).encode())
    except (OSError, StorageError):
        pass  # a shelf that takes nothing, such as a read-only file system, costs a measurement per call and no more
    return found


def remembered_bytes(bundle: Bundle, engine: str = "auto", *, metrics: bool = False) -> int | None:
    """Return the figure that :func:`runtime_bytes` has remembered; None where there is none that can be read."""
    try:
        found = json.loads(_file(bundle, engine, metrics).read_bytes())["runtime_bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if type(found) is int and found > 0 else None


def measure_runtime(bundle: Bundle, engine: str = "auto") -> int:
    """Return what one step takes in this process beyond what the planner counts of it.

    Every graph is run on zeros: code and tables of a runtime come into memory when they are first used, not when they
    are loaded. Then a step is measured, phase by phase, and what is predicted of the phase is taken off; the most of
    them counts. So all is in the figure that does not grow with the batch: code, threads, packed weights, the small
    blocks of a run and the holes between them (1 to 4 MiB), which are given back only when a step has ended. Where the
    high-water mark cannot be reset, what is resident after the step stands for it.

    One sample shows all to onnxruntime. torch takes other paths for more (14 MiB of code and primitives, with
    MobileNetV2), and its arena keeps from phase to phase and from step to step what the most of them took: there the
    second of two steps of 16 samples is measured, and as a whole; with factors of the size that plans have.
    """
    torch = choose_engine(engine).name == "torch"
    count = TORCH_SAMPLES if torch else 1
    manifest = bundle.manifest
    plan = make_plan(manifest, batch=count, calibration=None, epsilon=TORCH_EPSILON if torch else 1.0, runtime_bytes=0)
    session = TrainingSession(bundle, plan, engine=engine)  # verified, as the agent's own session is
    x = {spec.name: np.zeros((count, *spec.shape), spec.dtype) for spec in manifest.inputs}
    y = np.zeros((count, *manifest.targets.shape), manifest.targets.dtype)
    features = list(session.features(x))
    session.predict_features(features)
    calibrate(session, manifest, [tuple(features)])
    session.step_features(features, y)
    gc.collect()
    heap.trim()  # as before a plan comes into force
    if torch:
        session.step_features(list(session.features(x)), y)
    meter, taken_bytes = real_meter()
    peaks = PhasePeaks(meter)
    session.phase_ended = peaks.ended
    peaks.begin()
    features = list(session.features(x))
    peaks.ended("trunk")
    session.step_features(features, y)
    counted = sum(plan.ledger[line] for line in ("weights", "parameters", "optimizer"))
    # At full rank the train graph reads the full bases themselves: they are there once, not twice.
    counted += plan.ledger["bases"] if torch else full_basis_bytes(settled_for(manifest, plan).saved)
    if not peaks.resettable:
        return max(0, taken_bytes() - counted)
    predicted = predict(
        settled_for(manifest, plan), batch=count, micro_batch=plan.micro_batch, ranks=plan.ranks, runtime_bytes=0
    )
    counted_bytes = {phase: predicted.peaks[phase].bytes for phase in peaks.measured_bytes if phase in predicted.peaks}
    if torch:
        return max(0, peaks.step_bytes - max(counted_bytes.values()) - counted)
    beyond = [peaks.measured_bytes[phase] - size_bytes for phase, size_bytes in counted_bytes.items()]
    return max(0, max(beyond) - counted)


def measure_runtime_apart(bundle: Bundle, engine: str = "auto", *, metrics: bool = False) -> int:
    """Return what :func:`measure_runtime` finds in a new process that has loaded what an agent loads, whatever this one
    holds already.

    Raises:
        EngineError: the process failed; its own words are in the message.
        MemoryExhaustedError: it was killed, which a kernel out of memory does.
    """
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "edgetune.agent.baseline", str(bundle.path.resolve()), engine]
    command += [_METRICS] * metrics
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    if done.returncode == -signal.SIGKILL:
        raise MemoryExhaustedError("the process that measures the runtime was killed; most likely memory ran out")
    if done.returncode != 0:
        raise EngineError(f"the runtime could not be measured: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    return int(done.stdout.split()[-1])


def _file(bundle: Bundle, engine: str, metrics: bool) -> Path:
    """Return where one figure is remembered; its name is a digest of all that tells it from another."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The base directory specification: a relative path is to be ignored.
    root = Path(given) if os.path.isabs(given) else Path(os.path.expanduser("~")) / ".cache"
    known = {entry.metadata["Name"]: entry.version for entry in map(_distribution, _DISTRIBUTIONS) if entry is not None}
    parts = [_MEASURE, bundle.digest, choose_engine(engine).name, sys.version, platform.platform(), known]
    parts += [str(Path(__file__).resolve()), len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")]
    parts += [_METRICS] * metrics
    return root / "edgetune" / "runtime" / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.json"


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def load_agent(manifest: Manifest) -> None:
    """Bring into memory what an agent uses besides its session: image codecs, the ledger's SQLite, the planner."""
    for module in _AGENT:
        importlib.import_module(module)
    from PIL import Image

    from edgetune.agent.ledger import Ledger

    for format in ("PNG", "JPEG"):
        stream = io.BytesIO()
        Image.new("RGB", (32, 32)).save(stream, format)
        with Image.open(stream) as picture:
            np.asarray(picture.resize((16, 16)))
    with tempfile.TemporaryDirectory(prefix="edgetune-") as scratch:
        Ledger(Path(scratch) / "ledger").close()
    make_plan(manifest, batch=8, calibration=None, budget_bytes=1 << 50, runtime_bytes=0)


@contextmanager
def serving_metrics() -> Iterator[None]:
    """Within the block there is an endpoint for monitors, which has answered once."""
    exporter = Exporter(Numbers(), "127.0.0.1", 0)
    with socket.create_connection(("127.0.0.1", exporter.port)) as client:
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        while client.recv(4096):
            pass
    try:
        yield
    finally:
        exporter.close()


if __name__ == "__main__":
    opened = Bundle.open(sys.argv[1], verify=False)
    load_agent(opened.manifest)
    with serving_metrics() if _METRICS in sys.argv[3:] else nullcontext():
        sys.stdout.write(f"{measure_runtime(opened, *sys.argv[2:3])}\n")
