"""Everything that a cell of the grid needs before anyone is timed, made in a process that is then forgotten.

    python -m tools.bench.prepare CELL

``CELL/cell.json`` says what is wanted. Written beside it: three batches, a bundle and a plan per codec of ours, the
trunk's features, and what rivals must know: the names of what is trained, and ASI's ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgetune.bundle import Array, Bundle, Manifest
from edgetune.engines.session import TrainingSession
from edgetune.export.bundling import ExportOptions, export_bundle
from edgetune.export.capture import Captured, capture
from edgetune.export.ort_training import write_ort_training
from edgetune.export.source import signatures_of
from edgetune.planning.plan import Plan, make_plan
from edgetune.planning.selection import default_selection, settle
from edgetune.planning.spectra import Calibration
from tools.bench.ours import FEATURES, codec_folder, crossing_bytes, write_plan
from tools.bench.subjects import SUBJECTS

Batch = tuple[list[Array], Array]
ARTIFACTS, ARTIFACTS_FEATURES = "ort-training", "ort-training.npz"  # as ort_training.py reads them
_ENGINE, _CALIBRATION_SAMPLES, _ROUNDS = "onnxruntime", 64, 4


def prepare(folder: Path) -> None:
    """Fill ``folder``; see the module."""
    told = json.loads((folder / "cell.json").read_text())
    subject = dataclasses.replace(SUBJECTS[told["model"]], side=told["side"])
    batch, codecs = told["batch"], [*told["codecs"], *(["dense"] if told["ort_training"] else [])]
    inputs = [subject.draw(batch, seed) for seed in (1, 2, 3)]
    for index, (x, y) in enumerate(inputs):
        np.savez(folder / f"batch-{index}.npz", x=x, y=y)
    model = SUBJECTS[told["model"]].model(Path(told["cache"]))
    signatures = signatures_of(inputs[0][0][:1])
    make = functools.cache(lambda: capture(model, signatures))  # once for all codecs
    bundles = {codec: _bundle(told, make, codec) for codec in dict.fromkeys(("hosvd", *codecs))}
    drawn = [subject.draw(min(batch, 32), 100 + i)[0] for i in range(-(-_CALIBRATION_SAMPLES // min(batch, 32)))]
    reference: _Reference | None = None
    for codec, bundle in bundles.items():
        spare = _plan(bundle, batch, None, 1.0)
        session = TrainingSession(bundle, spare, engine=_ENGINE, hyper={"learning_rate": 0.0}, verify=False)
        calibration = _calibration(session, bundle, drawn)
        plan = _plan(bundle, batch, calibration, told["epsilon"])
        batches = [(list(session.features(x)), y) for x, y in inputs]
        if reference is None:
            reference = _Reference.of(session, plan, batches)
        if codec == "asi":
            plan = _matched(session, plan, reference, batches)
        if codec in ("hosvd", *codecs):
            _write(folder, codec, bundle, plan, batches)
        if codec == "hosvd":
            told |= _known(bundle.manifest, plan, batch)
        if codec == "asi":
            _set_ranks(told["layers"], bundle.manifest, plan, batch)
    if told["ort_training"]:
        _write_artifacts(folder, bundles["dense"], inputs[0])
    told["training"] = SUBJECTS[told["model"]].training(Path(told["cache"]))
    (folder / "cell.json").write_text(json.dumps(told))


@dataclasses.dataclass(frozen=True)
class _Reference:
    """The ranks of ``hosvd`` at ε, and the energy that they captured of the batch."""

    ranks: Mapping[str, Mapping[str, int]]
    energy: Mapping[str, float]

    @staticmethod
    def of(session: TrainingSession, plan: Plan, batches: Sequence[Batch]) -> _Reference:
        return _Reference(plan.ranks, _energies(session, plan, batches[:1]))


def _bundle(told: Mapping[str, Any], captured: Callable[[], Captured], codec: str) -> Bundle:
    """Return the bundle of this model, exported once for all cells of a run."""
    place = Path(told["bundles"]) / f"{told['model']}-{told['side']}-{told['last']}-{codec_folder(codec)}"
    if (place / "manifest.json").exists():
        return Bundle.open(place)
    last = told["last"] if told["last"] == "all" else int(told["last"])
    own = onnx.ModelProto()
    own.CopyFrom(captured().model)  # an export writes into it
    return export_bundle(dataclasses.replace(captured(), model=own), place, ExportOptions(last=last, codec=codec))


def _calibration(session: TrainingSession, bundle: Bundle, drawn: Sequence[Array]) -> Calibration | None:
    from edgetune.engines.calibration import calibrate

    if not any(mode.spectrum for saved in bundle.manifest.saved for o in saved.options for mode in o.modes):
        return None
    return calibrate(session, bundle.manifest, (session.features(x) for x in drawn))


def _plan(bundle: Bundle, batch: int, calibration: Calibration | None, epsilon: float) -> Plan:
    return make_plan(bundle.manifest, batch=batch, calibration=calibration, epsilon=epsilon, runtime_bytes=0)


def _energies(session: TrainingSession, plan: Plan, batches: Sequence[Batch]) -> dict[str, float]:
    session.set_plan(plan)
    for features, y in batches:
        session.step_features(list(features), y)
    names = {spec.energy: spec.name for spec in session._manifest.saved if spec.energy}
    return {names.get(name, name): value for name, value in session.report.energy.items()}


def _matched(session: TrainingSession, plan: Plan, wanted: _Reference, batches: Sequence[Batch]) -> Plan:
    """Return ``plan`` with ranks in proportion to those of ``hosvd`` that capture as much energy, as near as it gets.

    Every tensor's ranks are found by bisection on a factor of its own, all at once: no error reaches another layer.
    """
    manifest = session._manifest
    low = {spec.name: 0.0 for spec in manifest.saved}
    high = {spec.name: 1.25 for spec in manifest.saved}

    def ranks(scale: Mapping[str, float]) -> dict[str, dict[str, int]]:
        made: dict[str, dict[str, int]] = {}
        for spec in manifest.saved:
            for mode in spec.modes:
                size = mode.size or plan.batch
                base = wanted.ranks.get(spec.name, {}).get(mode.letter, size)
                made.setdefault(spec.name, {})[mode.letter] = max(1, min(size, round(base * scale[spec.name])))
        return made

    order = [*batches[1:], *batches[1:], batches[0]]  # a sketch takes some steps to become a basis
    best: dict[str, tuple[float, float]] = {}
    for attempt in range(_ROUNDS):
        middle = {name: (low[name] + high[name]) / 2 if attempt else 1.0 for name in low}
        found = _energies(session, dataclasses.replace(plan, ranks=ranks(middle)), order)
        for name, value in found.items():
            over = value - wanted.energy.get(name, 0.0)
            best[name] = min(best.get(name, (math.inf, 1.0)), (abs(over), middle[name]))
            (high if over >= 0 else low)[name] = middle[name]
    scales = {name: best[name][1] if name in best else 1.0 for name in low}
    return dataclasses.replace(plan, ranks=ranks(scales))


def _write(folder: Path, codec: str, bundle: Bundle, plan: Plan, batches: Sequence[Batch]) -> None:
    place = folder / codec_folder(codec)
    write_plan(plan, place)
    manifest = settle(bundle.manifest, default_selection(bundle.manifest) | dict(plan.selection))
    saved = {"saved": crossing_bytes(manifest, plan), "saved_inputs": plan.saved_bytes}
    (place / "bundle.json").write_text(json.dumps({"path": str(bundle.path.resolve()), "saved": saved}))
    for index, (features, y) in enumerate(batches):
        np.savez(place / FEATURES.format(index), y, *features)


def _write_artifacts(folder: Path, bundle: Bundle, batch: tuple[Array, Array]) -> None:
    """Write what onnxruntime-training trains the tail of ``bundle`` with: a bundle whose inputs are the features."""
    manifest = bundle.manifest
    graphs = {name: graph for name, graph in manifest.graphs.items() if name != "trunk"}
    tail = Bundle(bundle.path, dataclasses.replace(manifest, inputs=manifest.features, graphs=graphs))
    plan = _plan(bundle, len(batch[1]), None, 1.0)
    write_ort_training(tail, plan, folder / ARTIFACTS, hyper={"momentum": 0.0})  # its SGD has none
    session = TrainingSession(bundle, plan, engine=_ENGINE, verify=False)
    np.savez(folder / ARTIFACTS_FEATURES, batch[1], *session.features(batch[0]))


def _known(manifest: Manifest, plan: Plan, batch: int) -> dict[str, Any]:
    trained = [spec.name for spec in manifest.parameters]
    coded = [layer for layer in manifest.layers if layer.role == "tail"]
    layers = {layer.weight: {"saved": layer.saved, "input_shape": list(layer.input_shape)} for layer in coded}
    _set_ranks(layers, manifest, plan, batch)
    return {"trained": trained, "layers": layers}


def _set_ranks(layers: dict[str, dict[str, Any]], manifest: Manifest, plan: Plan, batch: int) -> None:
    """Note the ranks of every mode of the input of each layer; a mode without one is left whole."""
    specs = {spec.name: spec for spec in manifest.saved}
    for layer in layers.values():
        spec, shape = specs[layer["saved"]], layer["input_shape"]
        positions = "zhw"[3 - (len(shape) - 1) :] if len(shape) > 1 else ""
        letters = f"b{positions}c" if spec.channels_last else f"bc{positions}"
        ranks = plan.ranks.get(layer["saved"], {})
        layer["asi_ranks"] = [ranks.get(letter, size) for letter, size in zip(letters, (batch, *shape), strict=True)]


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
