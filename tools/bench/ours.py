"""EdgeTune in a worker: one engine, one bundle, one plan. Knows the package, not torch: the engine may bring it."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.bundle import Array, Bundle, Manifest
from edgetune.engines.session import TrainingSession
from edgetune.planning.plan import Plan
from edgetune.planning.sizes import nbytes
from edgetune.planning.spectra import Calibration
from tools.bench.processes import peak_of, processor_seconds, save_gradients, settle

PLAN, CALIBRATION, FEATURES = "plan.json", "calibration.safetensors", "features-{}.npz"
Node = tuple[str, tuple[str, ...], tuple[str, ...]]
"""A node's name, what it reads, what it makes."""


def write_plan(plan: Plan, folder: Path) -> None:
    """Write ``plan`` and the bases that it needs to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PLAN).write_text(plan.to_json())
    if plan.calibration is not None:
        plan.calibration.save(folder / CALIBRATION)


def read_plan(folder: Path) -> Plan:
    """Return the plan in ``folder``."""
    plan = Plan.from_json((folder / PLAN).read_text())
    if (folder / CALIBRATION).exists():
        plan = dataclasses.replace(plan, calibration=Calibration.load(folder / CALIBRATION))
    return plan


class Ours:
    """A training session that does one thing at a time when told."""

    def __init__(self, cell: Path, engine: str, codec: str) -> None:
        """Open what ``prepare`` left in ``cell`` for ``codec``; ``engine`` is its name, and maybe ``-fast`` memory."""
        self._data, self._folder = cell, cell / codec_folder(codec)
        place = json.loads((self._folder / "bundle.json").read_text())["path"]
        self._engine, _, memory = engine.partition("-")
        self._bundle, self._memory = Bundle.open(Path(place)), memory or "lean"
        self._session = self._open()
        self._features, self._y = self._load(0)

    def _open(self) -> TrainingSession:
        plan, hyper = read_plan(self._folder), {"learning_rate": 0.0}
        return TrainingSession(self._bundle, plan, engine=self._engine, hyper=hyper, memory=self._memory, verify=False)

    def _load(self, index: int) -> tuple[list[Array], Array]:
        with np.load(self._folder / FEATURES.format(index)) as stored:
            y, *features = (stored[f"arr_{i}"] for i in range(len(stored.files)))
        return features, y

    def step(self) -> dict[str, float]:
        """Do one step from the features, and return its seconds."""
        used, begin = processor_seconds(), time.perf_counter()
        self._session.step_features(list(self._features), self._y)
        seconds = time.perf_counter() - begin
        told = self._session.report.seconds
        return {"step": seconds, "processor": processor_seconds() - used, **told}

    def trunk(self) -> dict[str, float]:
        """Compute the features once."""
        with np.load(self._data / "batch-0.npz") as stored:
            x = stored["x"]
        begin = time.perf_counter()
        self._session.features(x)
        return {"trunk": time.perf_counter() - begin}

    def peak(self) -> dict[str, int]:
        """Return the peak of a step, see ``peak_of``."""
        self._features, self._y = [], np.zeros(0)
        found = peak_of(lambda: self._load(0), lambda given: self._session.step_features(*given))
        self._features, self._y = self._load(0)
        return found

    def gradients(self, file: str) -> dict[str, Any]:
        """Write the gradients of the batch to ``file``; return loss, captured energies and ranks."""
        for index in (1, 2):  # factors that are carried from step to step come from other batches
            self._session.step_features(*self._load(index))
        self._session.step_features(list(self._features), self._y)
        energy = dict(self._session.report.energy)
        for index in (1, 2):
            self._session.step_features(*self._load(index))
        loss, made = self._session.gradients_from(list(self._features), self._y)
        save_gradients(file, made)
        manifest = self._session._manifest
        names = {spec.name: spec for spec in manifest.saved}
        kept = {layer.weight: names[layer.saved].options[0].label for layer in manifest.layers}
        ranks = {name: dict(modes) for name, modes in self._session.plan.ranks.items()}
        return {"loss": loss, "energy": energy, "ranks": ranks, "kept": kept}

    def saved(self) -> dict[str, Any]:
        """Return the bytes that wait for the backward pass, as planned: everything, masks and indices included, and
        those of the layers' inputs alone."""
        found: dict[str, Any] = json.loads((self._folder / "bundle.json").read_text())["saved"]
        return found

    def held(self) -> dict[str, Any]:
        """Return what the allocator says is in use after the forward pass, above the targets and what is always there.

        Takes the session apart: nothing else works afterwards.
        """
        from tools import codec_memory

        stop = {"onnxruntime": codec_memory._stop_onnxruntime, "torch": codec_memory._stop_torch}
        run = stop[self._session._runtime.name](self._session)
        run(self._load(0), lambda: 0)
        settle()
        given = self._load(0)
        before = codec_memory.in_use_bytes() - sum(feature.nbytes for feature in given[0])
        return {"held": run(given, codec_memory.in_use_bytes) - before}

    def phases(self) -> dict[str, float]:
        """Return the seconds of forward, compress and backward, from the time of every node in steps of its own.

        The forward pass is what the loss needs; what else stands before the loss is done for the backward pass: codecs'
        encoders, masks, captured energies. These steps are slower than others: the shares are what counts.
        """
        timed = {"onnxruntime": _onnxruntime_nodes, "torch": _torch_nodes}[self._session._runtime.name]
        nodes, seconds = timed(self._session, lambda: self._session.step_features(list(self._features), self._y))
        return by_phase(nodes, seconds, self._bundle.manifest.graphs["train"].outputs)


def crossing_bytes(manifest: Manifest, plan: Plan) -> int:
    """Return the bytes that are alive, as planned, when the forward pass has ended, but for what is always there."""
    graph = manifest.graphs["train"]
    ends = [use.first + 1 for use in graph.tensors if use.name in ("loss", "correct")]
    boundary = graph.stages[0].end if graph.stages else max(ends)
    read = {n for s in graph.stages[1:] for n in s.inputs} if graph.stages else {use.name for use in graph.tensors}
    always = {"constant", "parameter", "buffer", "state", "basis", "scalar", "target"}
    buffers: dict[str, int] = {}
    for use in graph.tensors:
        feature = use.kind == "feature" and use.name in read
        if use.kind not in always and use.last >= boundary and (feature or 0 <= use.first < boundary):
            buffers[use.buffer] = max(buffers.get(use.buffer, 0), nbytes(use, plan.symbols()))
    return sum(buffers.values())


def codec_folder(codec: str) -> str:
    """Return the name of the folder for what belongs to ``codec``."""
    return codec.replace(":", "-").replace("=", "-").replace(",", "-").replace("+", "-")


def by_phase(nodes: Sequence[Node], seconds: Mapping[str, float], outputs: Sequence[str]) -> dict[str, float]:
    """Return the sums over ``nodes``, in the order of execution; ``outputs`` are those of the train graph."""
    needed = {name for name in outputs if name in ("loss", "correct")}
    forward = set()
    for index in range(len(nodes) - 1, -1, -1):
        _, reads, makes = nodes[index]
        if needed.intersection(makes):
            needed.update(reads)
            forward.add(index)
    last = max(forward, default=-1)
    found = {"forward": 0.0, "compress": 0.0, "backward": 0.0}
    for index, (name, _, _) in enumerate(nodes):
        phase = "forward" if index in forward else "compress" if index < last else "backward"
        found[phase] += seconds.get(name, 0.0)
    return found


def _onnxruntime_nodes(session: TrainingSession, step: Callable[[], object]) -> tuple[list[Node], dict[str, float]]:
    import onnx

    runtime: Any = session._runtime
    stages = runtime._spec("train").run_stages()
    before = dict(runtime._sessions)
    nodes, seconds = list[Node](), dict[str, float]()
    with tempfile.TemporaryDirectory() as scratch:
        for stage in range(len(stages)):
            runtime._sessions["train", stage] = runtime._loaded("train", stage, profile=Path(scratch) / str(stage))
            model = runtime._model("train", stage)
            read = onnx.load_model(model, load_external_data=False) if isinstance(model, str) else onnx.ModelProto()
            if isinstance(model, bytes):
                read = onnx.load_model_from_string(model)
            nodes += [(n.name, (*n.input, *_captured(n)), tuple(n.output)) for n in read.graph.node]
        for _ in range(3):
            step()
        known = {name for name, _, _ in nodes}
        for stage in range(len(stages)):
            file = runtime._sessions["train", stage].end_profiling()
            for event in json.loads(Path(file).read_text()):
                name = str(event["name"]).removesuffix("_kernel_time")
                if event.get("cat") == "Node" and name in known and name != event["name"]:
                    seconds[name] = seconds.get(name, 0.0) + event["dur"] * 1e-6 / 3
    runtime._sessions.clear()
    runtime._sessions.update(before)
    return nodes, seconds


def _captured(node: Any) -> list[str]:
    return [name for a in node.attribute for inner in a.g.node for name in inner.input]


def _torch_nodes(session: TrainingSession, step: Callable[[], object]) -> tuple[list[Node], dict[str, float]]:
    runtime: Any = session._runtime
    nodes, seconds = list[Node](), dict[str, float]()
    step()
    wrapped = []
    for program in runtime._programs["train"]:
        plain = program._execute

        def timed(one: Any, *given: Any, run: Callable[..., None] = plain) -> None:
            begin = time.perf_counter()
            run(one, *given)
            seconds[one.call.name] = seconds.get(one.call.name, 0.0) + (time.perf_counter() - begin) / 3

        program._execute = timed
        wrapped.append(program)
        nodes += [(s.call.name, (*s.inputs, *(s.captured or ())), s.outputs) for s in program._steps]
    for _ in range(3):
        step()
    for program in wrapped:
        del program._execute
    return nodes, seconds
