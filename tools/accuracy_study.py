"""One task with one seed: a pretrained model, its bundles, the plans that are compared. Knows torch and the package.

All bytes that a plan leaves for the backward pass are told apart here: what codecs keep, masks and indices, the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import edgetune
from edgetune.agent.baseline import measure_runtime_apart
from edgetune.api import calibrate_bundle
from edgetune.bundle import Array, Bundle
from edgetune.commands import _digits
from edgetune.errors import BudgetError
from edgetune.planning.knobs import layers_before_head
from edgetune.planning.plan import RESERVE_BYTES, Plan, make_plan
from edgetune.planning.selection import settle
from edgetune.planning.spectra import Calibration
from tools import accuracy_run, codec_memory
from tools.accuracy_curves import MIX
from tools.accuracy_tasks import Task
from tools.codec_study import crossing_bytes

if TYPE_CHECKING:
    from torch import nn

CODECS = (
    "hosvd", "hosvd:storage=log8", "asi", "svd", "dct", "haar", "db3", "threshold", "patch", "patch:size=4", "int8",
    "int4", "fp16", "recompute", "dense", "hosvd-exact",
)  # fmt: skip
APART = ("hosvd-exact", "dense")
"""The menu of a bundle of its own, for the torch engine: the first takes seconds a step on onnxruntime."""
EPSILONS = {
    "hosvd": (0.9, 0.97, 0.99), "hosvd:storage=log8": (0.9, 0.95, 0.97, 0.99), "hosvd-exact": (0.9,), "asi": (0.9,),
    "svd": (0.9,),
}  # fmt: skip
RATES = {"dct": (24, 8), "haar": (24, 8), "db3": (24, 8), "threshold": (24, 8)}
SHARES = (32, 16, 8, 4)
"""Activation budgets of the planner's mix, dense over what may be saved; where that is too little, the least."""
PEAKS = (0.0, 0.4)
"""Budgets for the process: where they lie between the least that can be kept and that of dense."""
CALIBRATION_BATCHES = 2


@dataclass(frozen=True)
class Arm:
    """One plan to fine-tune with. ``series`` is its codec's label, or ``MIX``; ``knob`` tells rate or budget."""

    series: str
    knob: str
    engine: str
    bundle: str
    plan: Plan

    @property
    def key(self) -> str:
        """A name that tells it from the others of the same study."""
        return f"{self.series}, {self.knob}, {self.engine}"


@dataclass(frozen=True)
class Saved:
    """Bytes that are alive at the end of the forward pass, as planned, for the backward pass.

    ``codecs``: of the inputs of trained layers, that of the head included (it is never compressed). ``masks``: signs,
    one bit per element, and indices of pooling. ``other``: all else, such as features that are read again.
    """

    codecs: int
    masks: int
    other: int


class Study:
    """A task whose model was trained and exported with the codecs to compare; ``hosvd-exact`` in a bundle of its own.

    Calibrated on the first batches of the stream, as a device would. Features are on disk: the trunk is frozen, so they
    never change.
    """

    def __init__(
        self, task: Task, model: nn.Module, folder: Path, batch: int, last: int, codecs: Sequence[str], mixes: bool
    ) -> None:
        self.task, self.folder, self.batch, self.codecs, self.mixes = task, folder, batch, tuple(codecs), mixes
        x, y = _digits.to_input(task.stream[0]), task.stream[1]
        test = _digits.to_input(task.test[0])
        batches = [(x[i : i + batch], y[i : i + batch]) for i in range(0, CALIBRATION_BATCHES * batch, batch)]
        menus = {"menu": tuple(dict.fromkeys((*(label for label in codecs if label not in APART[:1]), "dense")))}
        if APART[0] in codecs:
            menus["apart"] = APART
        self.bundles: dict[str, Bundle] = {}
        self.calibrations: dict[str, Calibration | None] = {}
        for name, menu in menus.items():
            place = folder / name
            place.mkdir(parents=True)
            bundle = edgetune.export(model, x[:2], place / "bundle", last=last, codec="+".join(menu), optimizer="adamw")
            self.bundles[name] = bundle
            self.calibrations[name] = calibrate_bundle(bundle, batch, batches, errors=mixes and name == "menu")
            for array, label in ((y, accuracy_run.STREAM_LABELS), (task.test[1], accuracy_run.TEST_LABELS)):
                np.save(place / f"{label}.npy", array)
            np.save(place / f"{accuracy_run.INPUTS}.npy", x)
            session = edgetune.TrainingSession(bundle, self._plan(name, codec="dense", epsilon=1.0), verify=False)
            for inputs, label in ((x, accuracy_run.STREAM), (test, accuracy_run.TEST)):
                accuracy_run.write_features(place, label, session.features(inputs))
            features = session.features(x[:batch])
            np.savez(place / codec_memory.FEATURES, y[:batch], *features)
        names = {parameter.name for parameter in self.bundles["menu"].manifest.parameters}
        self.autograd_bytes = autograd_bytes(model, names, x[:batch], y[:batch])

    def _plan(self, name: str, *, runtime_bytes: int = 0, without: str = "", **how: Any) -> Plan:
        # As edgetune.plan, which would measure the runtime anew for every plan. What is compared are codecs, so the
        # other knobs are pinned: all layers, whole batches.
        manifest = self.bundles[name].manifest
        saved = (
            dataclasses.replace(spec, options=tuple(o for o in spec.options if o.codec != without))
            for spec in manifest.saved
        )
        return make_plan(
            dataclasses.replace(manifest, saved=tuple(saved)), batch=self.batch, calibration=self.calibrations[name],
            runtime_bytes=runtime_bytes, reserve_bytes=RESERVE_BYTES, trained=layers_before_head(manifest),
            micro_batch=self.batch, tail_micro_batch=self.batch, cache_bytes=0, **how,
        )  # fmt: skip

    def arms(self) -> list[Arm]:
        """Return the plans of every codec, and those of the planner's own choice; no two of these are equal."""
        made = [arm for label in self.codecs for arm in self._singles(label)]
        if "apart" in self.bundles:
            made.append(Arm("dense", "—", "torch", "apart", self._plan("apart", codec="dense", epsilon=1.0)))
        return [*made, *(self._mixes() if self.mixes else ())]

    def _singles(self, label: str) -> list[Arm]:
        name = "apart" if label == "hosvd-exact" else "menu"
        engine = "torch" if name == "apart" else "onnxruntime"

        def arm(knob: str, **how: Any) -> Arm:
            return Arm(label, knob, engine, name, self._plan(name, codec=label, **how))

        if label in EPSILONS:
            return [arm(f"ε = {epsilon}", epsilon=epsilon) for epsilon in EPSILONS[label]]
        if label in RATES:
            return [arm(f"λ = {rate}", rate=float(rate)) for rate in RATES[label]]
        return [arm("—", epsilon=1.0)]

    def _mixes(self) -> list[Arm]:
        dense = self._plan("menu", codec="dense", epsilon=1.0).dense_saved_bytes
        made: list[Arm] = []

        def add(knob: str, plan: Plan) -> None:
            if all((arm.plan.selection, arm.plan.ranks) != (plan.selection, plan.ranks) for arm in made):
                made.append(Arm(MIX, knob, "onnxruntime", "menu", plan))

        for share in SHARES:
            # What recompute starts from counts as nothing there, so it would be chosen for all at any such budget.
            given: dict[str, Any] = {"allocation": "per-layer", "without": "recompute"}
            try:
                plan = self._plan("menu", activation_budget_bytes=dense // share, **given)
            except BudgetError as error:
                plan = self._plan("menu", activation_budget_bytes=error.least_bytes, **given)
            add(f"saved ≤ 1/{share}", plan)
        if PEAKS:
            runtime = measure_runtime_apart(self.bundles["menu"], "onnxruntime")
            least = self._least(runtime)
            top = self._plan("menu", codec="dense", epsilon=1.0, runtime_bytes=runtime).predicted_peak_bytes
            for part in PEAKS:
                budget = int(least + part * max(top + RESERVE_BYTES - least, 0))
                made_for: dict[str, Any] = {"budget_bytes": budget, "runtime_bytes": runtime, "allocation": "per-layer"}
                add(f"peak at {part:.0%}", self._plan("menu", **made_for))
        return made

    def _least(self, runtime: int) -> int:
        """Return the least budget for the process that some mix keeps."""
        try:
            self._plan("menu", allocation="per-layer", budget_bytes=1, runtime_bytes=runtime)
        except BudgetError as error:
            return error.least_bytes
        raise AssertionError("one byte is enough for nothing")

    def write(self, arm: Arm) -> Path:
        """Write the plan of ``arm`` for another process; return its folder."""
        folder = self.folder / "plan"
        folder.mkdir(exist_ok=True)
        (folder / codec_memory.PLAN).write_text(arm.plan.to_json())
        (folder / codec_memory.CALIBRATION).unlink(missing_ok=True)
        calibration = self.calibrations[arm.bundle]
        if calibration is not None:
            dataclasses.replace(calibration, counts={}, errors={}).save(folder / codec_memory.CALIBRATION)
        return folder

    def saved(self, arm: Arm) -> Saved:
        """Return what the forward pass leaves, as planned, told apart."""
        bundle = self.bundles[arm.bundle]
        manifest = settle(bundle.manifest, arm.plan.selection)
        every = crossing_bytes(bundle, manifest, arm.plan)
        # Signs and indices are the only bytes that no codec stores.
        graph, stored = manifest.graphs["train"], {n for spec in manifest.saved for n in spec.options[0].stored}
        bare = dataclasses.replace(
            graph, tensors=tuple(t for t in graph.tensors if t.dtype != "uint8" or t.name in stored)
        )
        settled = dataclasses.replace(manifest, graphs={**manifest.graphs, "train": bare})
        without = crossing_bytes(bundle, settled, arm.plan)
        masks = every - without
        return Saved(arm.plan.saved_bytes, masks, every - masks - arm.plan.saved_bytes)


def autograd_bytes(model: nn.Module, trained: set[str], x: Array, y: Array) -> int:
    """Return what PyTorch keeps for the backward pass when it trains the same tensors: evaluation mode, the frozen
    part without a graph; every storage once, parameters and buffers not counted."""
    import torch

    model.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    standing = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # alive until counted: an address may not be used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in standing:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    targets = torch.from_numpy(y)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.nn.functional.cross_entropy(model(torch.from_numpy(x)), targets)
    known = targets.untyped_storage().data_ptr()
    return sum(size for place, size in found.items() if place != known)
