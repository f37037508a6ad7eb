"""What one plan takes of a real process: memory after the forward pass, the peak of a step, and its time.

Meant for a process that has measured nothing before. Knows the engines from inside, because it stops one between the
forward and the backward pass; needs glibc, whose allocator tells how many bytes are in use.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.bundle import Array, Bundle
from edgetune.engines import heap
from edgetune.engines.checks import checked_targets
from edgetune.engines.session import TrainingSession
from edgetune.planning.lifetimes import boundary_of
from edgetune.planning.plan import Plan
from edgetune.planning.selection import _stages
from edgetune.planning.spectra import Calibration
from edgetune.telemetry.process import PeakMeter, resident_bytes

FEATURES, PLAN, CALIBRATION = "features.npz", "plan.json", "calibration.safetensors"
_FEWEST, _MOST = 2, 12


@dataclass(frozen=True)
class Memory:
    """Bytes of one plan on one engine.

    Attributes:
        held: in use after the forward pass, above what was in use with the targets alone: what the forward pass leaves
            for the backward pass, whatever it is.
        resident: in use between two steps: weights, parameters, optimizer state, bases, constants, the engine's graph.
        peak: of a whole step, above what was resident then.
        seconds, dense_seconds: medians of train and update; those of dense were run in turn with the others.
    """

    held: int
    resident: int
    peak: int
    seconds: float
    dense_seconds: float


class _Mallinfo2(ctypes.Structure):
    # fmt: off
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
        )
    ]
    # fmt: on


def in_use_bytes() -> int:
    """Return what is handed out and not given back: glibc's blocks, those that it maps, the torch arena."""
    call = ctypes.CDLL("libc.so.6").mallinfo2
    call.restype = _Mallinfo2
    info = call()
    heap_bytes = int(info.uordblks + info.hblkhd)
    arena = sys.modules.get("edgetune.engines.torch_ops.arena")
    if arena is None:
        return heap_bytes
    arena.ARENA.release()  # which takes back first what nothing uses
    return heap_bytes + int(arena.ARENA.used_bytes)


def measure(folder: Path, plan_folder: Path, dense_folder: Path, engine: str, seconds: float) -> Memory:
    """Measure the plan in ``plan_folder`` of the bundle in ``folder``; repeat steps for ``seconds`` or a little more.

    Raises:
        EdgeTuneError: the bundle or the plan is damaged, or there is no such engine.
    """
    bundle = Bundle.open(folder / "bundle")
    session = _session(bundle, plan_folder, engine)
    peak = _peak(session, folder)
    settle(session)
    resident = in_use_bytes()
    pair = [_session(bundle, dense_folder, engine), session]
    times: tuple[list[float], list[float]] = [], []
    begin = time.perf_counter()
    while len(times[1]) < _FEWEST + 1 or (len(times[1]) < _MOST and time.perf_counter() - begin < seconds):
        for made, one in zip(times, pair, strict=True):
            features, y = _load(folder)
            one.step_features(features, y)
            made.append(sum(one.report.seconds.values()))
    held = after_forward(session, folder)  # last, because it takes the session apart
    # The first step of each brings code and tables into memory.
    return Memory(held, resident, peak, statistics.median(times[1][1:]), statistics.median(times[0][1:]))


def _session(bundle: Bundle, plan_folder: Path, engine: str) -> TrainingSession:
    plan = Plan.from_json((plan_folder / PLAN).read_text())
    if (plan_folder / CALIBRATION).exists():
        plan = dataclasses.replace(plan, calibration=Calibration.load(plan_folder / CALIBRATION))
    return TrainingSession(bundle, plan, engine=engine, hyper={"learning_rate": 0.0}, verify=False)


def _load(folder: Path) -> tuple[list[Array], Array]:
    with np.load(folder / FEATURES) as stored:
        y, *features = (stored[f"arr_{i}"] for i in range(len(stored.files)))
    return features, y


def settle(session: TrainingSession) -> None:
    """Give back what is no longer used, so that what is resident is what is needed."""
    gc.collect()
    session._runtime.settle()
    heap.trim()


def _peak(session: TrainingSession, folder: Path) -> int:
    """Return the most bytes above what is resident before the features are loaded, over whole steps."""
    meter, peaks = PeakMeter(), []
    for _ in range(2):
        settle(session)
        before = resident_bytes()
        features, y = _load(folder)
        meter.reset()
        session.step_features(features, y)
        peaks.append(meter.peak_bytes() - before)
    return peaks[-1]  # the first brings code and tables into memory


def after_forward(session: TrainingSession, folder: Path) -> int:
    """Return how many bytes more are in use after the forward pass than with the targets alone in memory."""
    stop = {"onnxruntime": _stop_onnxruntime, "torch": _stop_torch}[session._runtime.name](session)
    stop(_load(folder), lambda: 0)  # what is made once, with the first run
    settle(session)
    given = _load(folder)
    before = in_use_bytes() - sum(feature.nbytes for feature in given[0])
    return stop(given, in_use_bytes) - before


Stop = Callable[[tuple[list[Array], Array], Callable[[], int]], int]
"""Runs a step on (features, targets), and returns what the second argument says at the end of the forward pass."""


def _stop_onnxruntime(session: TrainingSession) -> Stop:
    """Return what runs the forward stage alone.

    A graph whose backward pass reads a feature has one stage only: it is cut here at the same place as the others,
    and all features stay, as they do in that one stage.
    """
    runtime: Any = session._runtime
    spec = runtime._spec("train")
    dropped = set(spec.stages[0].inputs) - set(spec.stages[1].inputs) if spec.stages else set[str]()
    if not spec.stages:
        whole = session.bundle.manifest.graphs["train"]
        boundary = boundary_of(spec.wires, set(whole.ends), set())
        assert boundary is not None, "the forward pass ends somewhere"
        cut = dataclasses.replace(spec, stages=_stages(spec.wires, spec.inputs, spec.outputs, boundary))
        runtime._chosen["train"] = dataclasses.replace(runtime._chosen["train"], spec=cut)
        for key in [key for key in runtime._sessions if key[0] == "train"]:
            del runtime._sessions[key]
    first = runtime._spec("train").run_stages()[0]
    names = [spec.name for spec in session._manifest.features]

    def stop(given: tuple[list[Array], Array], tell: Callable[[], int]) -> int:
        features, y = given
        feeds = {name: runtime.put(value) for name, value in zip(names, features, strict=True)}
        features.clear()
        feeds[session._manifest.targets.name] = runtime.put(
            checked_targets(session._manifest, _arrays(runtime, feeds, names), y)
        )
        feeds |= session._state.feeds() | session._run_time_inputs(len(y))
        made = runtime.run("train", feeds, first.outputs, stage=0)
        feeds = {name: value for name, value in feeds.items() if name not in dropped}
        found = tell()
        assert len(made) == len(first.outputs)  # alive until here
        return found

    return stop


def _arrays(runtime: Any, feeds: dict[str, Any], names: list[str]) -> list[Array]:
    return [runtime.get(feeds[name]) for name in names]


def _stop_torch(session: TrainingSession) -> Stop:
    """Return what runs whole steps, and asks behind the last node of the forward pass."""
    runtime: Any = session._runtime
    runtime.load("train")
    programs = runtime._programs["train"]
    ends = set(session.bundle.manifest.graphs["train"].ends)
    told: list[int] = []
    asked: list[Callable[[], int]] = []
    if len(programs) > 1:
        run = runtime.run

        def staged(graph: str, *given: Any, stage: int = 0, **named: Any) -> Any:
            if graph == "train" and stage == 1:
                told.append(asked[0]())
            return run(graph, *given, stage=stage, **named)

        runtime.run = staged
    else:
        (program,) = programs
        last = max(i for i, step in enumerate(program._steps) if ends.intersection(step.outputs))
        execute = program._execute

        def stepwise(step: Any, *given: Any) -> None:
            execute(step, *given)
            if step is program._steps[last]:
                told.append(asked[0]())

        program._execute = stepwise

    def stop(given: tuple[list[Array], Array], tell: Callable[[], int]) -> int:
        told.clear()
        asked[:] = [tell]
        session.step_features(*given)
        return told[0]

    return stop
