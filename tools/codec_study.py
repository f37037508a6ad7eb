"""The plans that are compared, what each should keep, and how wrong its gradients are. Knows the package and numpy."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.bundle import Array, Bundle, Manifest
from edgetune.codecs.sparse import most_useful_count
from edgetune.engines.calibration import calibrate
from edgetune.engines.session import TrainingSession
from edgetune.errors import BudgetError
from edgetune.export.bundling import ExportOptions, export_bundle
from edgetune.export.source import signatures_of
from edgetune.planning.lifetimes import boundary_of
from edgetune.planning.plan import Plan, make_plan
from edgetune.planning.prediction import dense_bytes, saved_bytes_by_tensor
from edgetune.planning.selection import default_selection, settle
from edgetune.planning.sizes import nbytes
from edgetune.planning.spectra import Calibration
from tools.codec_memory import CALIBRATION, FEATURES, PLAN
from tools.codec_subjects import Subject

CODECS = (
    "dense", "fp16", "recompute", "hosvd", "hosvd:storage=float16", "hosvd-exact", "asi", "svd", "dct", "haar", "db3",
    "threshold", "patch", "patch:size=4", "patch:size=7", "int8", "int4",
)  # fmt: skip
_ENGINE = "torch"


@dataclass(frozen=True)
class Export:
    """What a bundle with all codecs in its menu costs the host, and how many tensors it saves."""

    seconds: float
    manifest_bytes: int
    nodes: int
    saved: int


@dataclass(frozen=True)
class Rate:
    """One codec at one rate.

    Attributes:
        codec: its label.
        wanted: dense bytes over the bytes that it may keep; None where the codec has no knob.
        knob: the ε of every mode, or the λ of which each one element is kept; None without a knob.
        saved_bytes: what the saved tensors take, as planned.
        crossing_bytes: what crosses from the forward to the backward pass in all, as planned: these, masks, indices
            of pooling, features that are read again, and what no codec was asked to keep.
        energy: the least captured energy of any tensor; None: lossless.
        mean_error: mean over the layers whose input the codec keeps of ‖dW~ - dW‖ / ‖dW‖; ``worst_error`` the largest.
        total_error: the same over all trained tensors as one vector.
    """

    codec: str
    wanted: float | None
    knob: float | None
    saved_bytes: int
    crossing_bytes: int
    energy: float | None
    mean_error: float
    worst_error: float
    total_error: float


class Study:
    """One subject: its bundle, a batch, the dense gradients on it, and a calibration from other batches."""

    def __init__(self, subject: Subject, codecs: Sequence[str], folder: Path) -> None:
        self.subject, self.folder = subject, folder
        menu = "+".join(dict.fromkeys(("dense", *codecs)))
        options = ExportOptions(last=subject.last, codec=menu, compress=subject.compress)
        x, self.y = subject.draw(subject.batch, 0)
        begin = time.perf_counter()
        self.bundle = export_bundle(subject.model(), folder / "bundle", options, signatures_of(x[:1]))
        graph, manifest = self.bundle.manifest.graphs["train"], self.bundle.path / "manifest.json"
        self.export = Export(
            time.perf_counter() - begin, manifest.stat().st_size, len(graph.nodes), len(self.bundle.manifest.saved)
        )
        self.dense = make_plan(
            self.bundle.manifest, batch=subject.batch, calibration=None, epsilon=1.0, runtime_bytes=0, codec="dense"
        )
        self.session = _session(self.bundle, self.dense)
        self.features = self.session.features(x)
        np.savez(folder / FEATURES, self.y, *self.features)
        drawn = [subject.draw(subject.batch, seed) for seed in (1, 2)]
        self.earlier = [(self.session.features(inputs), targets) for inputs, targets in drawn]
        self.calibration = calibrate(_Ranked(self.session), self.bundle.manifest, [f for f, _ in self.earlier])
        self.exact = self._gradients(self.dense)[0]

    def plans(self, codec: str, rates: Sequence[float]) -> list[tuple[float | None, float | None, Plan]]:
        """Return (wanted, knob, plan) of ``codec`` at ``rates``; once, if it has no knob."""
        selection = default_selection(self.bundle.manifest, codec)
        manifest = settle(self.bundle.manifest, selection)
        sources = {mode.source for spec in manifest.saved for mode in spec.modes if mode.rank}
        if not sources:
            return [(None, None, self._plan(manifest, selection, {}))]
        if sources == {"count"}:
            made: list[tuple[float | None, float | None, Plan]] = []
            for rate in rates:
                spread, ranks = self._counts(manifest, self._budget(rate))
                made.append((rate, spread, self._plan(manifest, selection, ranks)))
            return made
        return [(rate, *self._truncated(manifest, codec, rate)) for rate in rates]

    def _budget(self, rate: float) -> int:
        """Return what all saved tensors may take: those of the head, which is never compressed, as they are."""
        specs = self.bundle.manifest.saved
        fixed = sum(dense_bytes(spec, self.subject.batch) for spec in specs if len(spec.options) == 1)
        return fixed + int((self.dense.dense_saved_bytes - fixed) / rate)

    def _plan(self, manifest: Manifest, selection: Mapping[str, str], ranks: Mapping[str, Mapping[str, int]]) -> Plan:
        saved = saved_bytes_by_tensor(manifest, batch=self.subject.batch, ranks=ranks)
        kept = {name: size for tensors in saved.values() for name, size in tensors.items()}
        return dataclasses.replace(self.dense, selection=selection, ranks=ranks, saved_bytes=sum(kept.values()))

    def _counts(self, manifest: Manifest, most_bytes: float) -> tuple[float, dict[str, dict[str, int]]]:
        """Return λ, one for all tensors, and k = ⌊n / λ⌋ of each, such that all take ``most_bytes`` at most."""

        def ranks_for(spread: float) -> dict[str, dict[str, int]]:
            ranks = {}
            for spec in manifest.saved:
                n = math.prod(spec.shape)
                if any(mode.source == "count" for mode in spec.modes):
                    ranks[spec.name] = {"k": max(1, min(math.floor(n / spread), most_useful_count(n)))}
            return ranks

        def fits(spread: float) -> bool:
            saved = saved_bytes_by_tensor(manifest, batch=self.subject.batch, ranks=ranks_for(spread))
            return sum({k: v for tensors in saved.values() for k, v in tensors.items()}.values()) <= most_bytes

        low, high = 1.0, 1e6
        for _ in range(50):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high, ranks_for(high)

    def _truncated(self, manifest: Manifest, codec: str, rate: float) -> tuple[float | None, Plan]:
        given: dict[str, Any] = {
            "batch": self.subject.batch, "calibration": self.calibration, "runtime_bytes": 0, "codec": codec
        }  # fmt: skip
        try:
            plan = make_plan(self.bundle.manifest, activation_budget_bytes=self._budget(rate), **given)
        except BudgetError as error:  # what the codec does not apply to is too much already
            plan = make_plan(self.bundle.manifest, activation_budget_bytes=error.least_bytes, **given)
        return plan.epsilon, dataclasses.replace(plan, calibration=self._needed(manifest))

    def _needed(self, manifest: Manifest) -> Calibration | None:
        """Return the bases that the chosen codecs read, and nothing else of the calibration."""
        if self.calibration is None:
            return None
        read = {(s.name, mode.spectrum) for s in manifest.saved for mode in s.modes if mode.source == "basis"}
        spectra = {
            name: {key: found for key, found in modes.items() if (name, key) in read}
            for name, modes in self.calibration.spectra.items()
        }
        return dataclasses.replace(self.calibration, spectra={name: modes for name, modes in spectra.items() if modes})

    def rate(self, codec: str, wanted: float | None, knob: float | None, plan: Plan) -> Rate:
        """Return what ``plan`` keeps, and the errors of its gradients against the dense ones on the same batch."""
        found, energies = self._gradients(plan)
        manifest = settle(self.bundle.manifest, plan.selection)
        coded = {s.name for s in manifest.saved if s.options[0].label == codec}
        weights = dict.fromkeys(layer.weight for layer in manifest.layers if layer.saved in coded)
        errors = [_norm([found[w] - self.exact[w]]) / (_norm([self.exact[w]]) or 1.0) for w in weights]
        total = _norm([found[name] - value for name, value in self.exact.items()]) / _norm(list(self.exact.values()))
        crossing = crossing_bytes(self.bundle, manifest, plan)
        energy = min(energies.values(), default=None)
        mean = float(np.mean(errors)) if errors else 0.0
        worst = max(errors, default=0.0)
        return Rate(codec, wanted, knob, plan.saved_bytes, crossing, energy, mean, worst, total)

    def _gradients(self, plan: Plan) -> tuple[dict[str, Array], dict[str, float]]:
        self.session.set_plan(plan)
        if any(mode.source == "carried" for spec in self.session._manifest.saved for mode in spec.modes):
            for features, y in self.earlier:  # the factors that it carries are those of earlier batches
                self.session.step_features(features, y)
        ran = self.session._train(tuple(self.features), self.y)
        runtime = self.session._runtime
        made = {n.removeprefix("gradient/"): np.array(runtime.get(h), np.float64) for n, h in ran.gradients.items()}
        return made, {name: value for name, value in ran.scalars.items() if name.startswith("energy/")}

    def write(self, codec: str, plan: Plan) -> Path:
        """Write ``plan`` to a folder of its own, for another process; return the folder."""
        folder = self.folder / codec.replace(":", "-").replace("=", "-")
        folder.mkdir(exist_ok=True)
        (folder / PLAN).write_text(plan.to_json())
        if plan.calibration is not None and plan.calibration.spectra:
            plan.calibration.save(folder / CALIBRATION)
        return folder


class _Ranked:
    """The Gram matrices of a session without what belongs to counts, which are given here, not found by an ε."""

    def __init__(self, session: TrainingSession) -> None:
        self._session = session

    def grams(self, features: tuple[Array, ...]) -> dict[str, dict[str, Array]]:
        found = self._session.grams(features)
        return {n: {key: g for key, g in modes.items() if not key.endswith(".k")} for n, modes in found.items()}


def _session(bundle: Bundle, plan: Plan) -> TrainingSession:
    return TrainingSession(bundle, plan, engine=_ENGINE, hyper={"learning_rate": 0.0}, verify=False)


def _norm(arrays: Sequence[Array]) -> float:
    return math.sqrt(sum(float(np.sum(np.square(array, dtype=np.float64))) for array in arrays))


def crossing_bytes(bundle: Bundle, manifest: Manifest, plan: Plan) -> int:
    """Return the bytes that are alive, as planned, when the forward pass has ended, but for what is always there."""
    graph = manifest.graphs["train"]
    boundary = boundary_of(graph.wires, set(bundle.manifest.graphs["train"].ends), set())
    assert boundary is not None, "the forward pass ends somewhere"
    always = {"constant", "parameter", "buffer", "state", "basis", "scalar", "target"}
    read = {name for wire in graph.wires[boundary:] for name in wire.inputs}
    buffers: dict[str, int] = {}
    for use in graph.tensors:
        # A graph of one stage cannot let go of a feature: its caller holds them all.
        feature = use.kind == "feature" and (not graph.stages or use.name in read)
        if use.kind not in always and use.last >= boundary and (feature or 0 <= use.first < boundary):
            buffers[use.buffer] = max(buffers.get(use.buffer, 0), nbytes(use, plan.symbols()))
    return sum(buffers.values())
