"""A small session, bundle, meter and data folder: everything the agent needs, in numpy, in milliseconds.

The fake session is softmax regression on 2 x 2 average-pooled images. Its input is stored projected on the bases of
the plan (modes c, h, w), as the real codec does, so ranks and captured energy mean something.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from edgetune.agent.parts import Parts
from edgetune.bundle import (
    FORMAT_VERSION,
    Array,
    Bundle,
    GraphSpec,
    InferenceSpec,
    LayerSpec,
    LossSpec,
    Manifest,
    ModeSpec,
    OptimizerSpec,
    OptionSpec,
    ParameterSpec,
    PreprocessSpec,
    SavedSpec,
    TensorSpec,
    TensorUse,
    write_manifest,
)
from edgetune.planning.plan import Plan
from edgetune.planning.spectra import identity_calibration

CLASSES = ("cat", "dog", "owl")
RUNTIME_BYTES = 1_000_000
POISON = (255, 0, 255)
"""An image of this colour alone makes the fake session's gradient NaN, and its loss unless told otherwise."""


def make_manifest(model: str = "fake") -> Manifest:
    """Return the manifest of the fake model: input [3, 8, 8], feature [3, 4, 4], one trained linear layer."""
    modes = tuple(
        ModeSpec(letter, size, 1, f"rank.head.{letter}", f"basis.head.{letter}", "basis" if size else "sketch", letter)
        for letter, size in (("c", 3), ("h", 4), ("w", 4))
    )
    core = ("batch", *(mode.rank for mode in modes))
    tensors = (
        TensorUse("x", ("batch", "3", "4", "4"), "float32", "feature", -1, 0, "x"),
        TensorUse("y", ("batch",), "int64", "target", -1, 2, "y"),
        *(TensorUse(m.input, ("1", str(m.size), m.rank), "float32", "basis", -1, 2, m.input) for m in modes),
        TensorUse("core", core, "float32", "saved", 0, 2, "core"),
        TensorUse("logits", ("batch", "3"), "float32", "transient", 1, 2, "logits"),
        TensorUse("head.weight.grad", ("3", "48"), "float32", "gradient", 2, 3, "head.weight.grad"),
    )
    train = GraphSpec("train.onnx", "train.flat.onnx", ("x", "y"), ("loss",), ("encode", "head", "backward"), tensors)
    return Manifest(
        format_version=FORMAT_VERSION,
        model=model,
        made_by="tests",
        opset=17,
        inputs=(TensorSpec("image", (3, 8, 8)),),
        features=(TensorSpec("x", (3, 4, 4)),),
        outputs=(TensorSpec("logits", (3,)),),
        targets=TensorSpec("targets", (), "int64"),
        classes=CLASSES,
        preprocess=PreprocessSpec("RGB", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        loss=LossSpec(),
        optimizer=OptimizerSpec("sgd", ("momentum",), {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.0}),
        codec="hosvd",
        layers=(LayerSpec("head", "Linear", "head", (3, 4, 4), "head.weight", None, "head"),),
        saved=(
            SavedSpec(
                "head",
                ("head",),
                (OptionSpec("hosvd", "hosvd", {}, True, modes, ("core",)),),
                (3, 4, 4),
                1,
                "energy.head",
            ),
        ),
        parameters=(ParameterSpec("head.weight", (3, 48), "head", "head"),),
        graphs={"train": train},
        inference=InferenceSpec("infer.onnx", ("logits",), ("head.weight",)),
    )


def make_bundle(path: Path, model: str = "fake") -> Bundle:
    """Write the fake bundle into the new directory ``path``."""
    path.mkdir(parents=True)
    for name in ("train.onnx", "train.flat.onnx"):
        (path / name).write_text("not a graph: the fake session has its own")
    (path / "infer.onnx").write_bytes(b"\x3a\x00")  # a model of onnx.proto: a graph without anything
    weight = np.random.default_rng(0).normal(0, 0.01, (3, 48)).astype(np.float32)
    save_file({"head.weight": weight}, path / "weights.safetensors")
    return write_manifest(path, make_manifest(model))


def make_image(path: Path, label: int, seed: int, size: int = 12) -> Path:
    """Write a PNG whose colour tells its class, with noise."""
    rng = np.random.default_rng([label, seed])
    pixels = rng.integers(0, 120, (size, size, 3))
    pixels[..., label] += 110
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")  # a camera that writes whole files
    Image.fromarray(pixels.astype(np.uint8)).save(temporary, format="PNG")
    return temporary.rename(path)


def make_folder(path: Path, per_class: int) -> Path:
    """Write ``per_class`` images for each class."""
    path.mkdir(parents=True, exist_ok=True)
    for label, name in enumerate(CLASSES):
        for seed in range(per_class):
            make_image(path / name / f"{seed:03d}.png", label, seed)
    return path


@dataclass(frozen=True)
class FakeReport:
    """What the agent reads of a step."""

    loss: float
    correct: int
    samples: int
    energy: dict[str, float]
    gradient_norm: float
    seconds: dict[str, float]


class FakeSession:
    """The interface of ``TrainingSession`` over softmax regression. ``on_step`` is called after every step."""

    def __init__(
        self,
        bundle: Bundle,
        plan: Plan,
        *,
        engine: str = "auto",
        hyper: Mapping[str, float] | None = None,
        seed: int = 0,
        on_step: Callable[[FakeSession], None] | None = None,
        loss_is_nan: bool = True,
    ) -> None:
        self.bundle, self.on_step, self.loss_is_nan = bundle, on_step, loss_is_nan
        self.weight = bundle.initial_parameters()["head.weight"]
        self.momentum = np.zeros_like(self.weight)
        self.step_number = 0
        self.hyper = {**bundle.manifest.optimizer.scalars, **(hyper or {})}
        self.report: FakeReport | None = None
        self.phase_ended: Callable[[str], None] | None = None
        self.plans: list[Plan] = []
        self.largest_micro_batch = 0
        self.whole = True
        self.largest_piece = 0
        self.discard()
        self.set_plan(plan)

    def set_plan(self, plan: Plan) -> None:
        self.plans.append(plan)
        calibration = plan.calibration or identity_calibration(self.bundle.manifest, plan.batch)
        self.bases = {}
        for letter, rank in plan.ranks["head"].items():
            basis = calibration.spectra["head"][letter].basis
            assert basis is not None
            self.bases[letter] = basis[0][:, :rank]

    def features(self, x: Array) -> tuple[Array, ...]:
        self.largest_micro_batch = max(self.largest_micro_batch, len(x))
        pooled = x.reshape(len(x), 3, 4, 2, 4, 2).mean(axis=(3, 5), dtype=np.float64)
        return (pooled.astype(np.float32),)

    def gradients_from(self, features: Sequence[Array], y: Array) -> tuple[float, dict[str, Array]]:
        loss, gradient, _, _ = self._gradient(features[0], y)
        return loss, {"head.weight": gradient}

    def _gradient(self, x: Array, y: Array) -> tuple[float, Array, int, float]:
        """Return the loss, the gradient from the decoded input, how many answers are right, and the energy kept."""
        c, h, w = (self.bases[letter] for letter in "chw")
        core = np.einsum("bchw,ci,hj,wk->bijk", x, c, h, w)
        decoded = np.einsum("bijk,ci,hj,wk->bchw", core, c, h, w)
        logits = x.reshape(len(x), -1) @ self.weight.T
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        p = shifted / shifted.sum(axis=1, keepdims=True)
        loss = float(-np.log(p[np.arange(len(y)), y]).mean())
        poisoned = np.all(np.isclose(x.mean(axis=(2, 3)), [1, -1, 1]), axis=1)
        if poisoned.any() and self.loss_is_nan:
            loss = float("nan")
        correct = int((logits.argmax(axis=1) == y).sum())
        p[np.arange(len(y)), y] -= 1
        gradient = (p.T @ decoded.reshape(len(x), -1) / len(x)) + (np.nan if poisoned.any() else 0)
        energy = float((core.astype(np.float64) ** 2).sum() / (x.astype(np.float64) ** 2).sum())
        return loss, gradient, correct, energy

    def step_features(self, features: Sequence[Array], y: Array) -> float:
        loss, gradient, correct, energy = self._gradient(features[0], y)
        if np.isfinite(loss) and np.isfinite(gradient).all():  # else nothing is applied, as in the real one
            self.momentum = (self.hyper["momentum"] * self.momentum + gradient).astype(np.float32)
            self.weight = (self.weight - self.hyper["learning_rate"] * self.momentum).astype(np.float32)
            self.step_number += 1
        self.report = FakeReport(
            loss, correct, len(y), {"head": energy}, float(np.linalg.norm(gradient)), {"train": 1e-4, "update": 1e-5}
        )
        if self.on_step is not None:
            self.on_step(self)
        return loss

    def add(self, features: Sequence[Array], y: Array) -> None:
        self.largest_piece = max(self.largest_piece, len(y))
        self.pieces.append((features[0], y))

    def finish(self) -> float:
        x, y = (np.concatenate(parts) for parts in zip(*self.pieces, strict=True))
        self.discard()
        return self.step_features([x], y)

    def discard(self) -> None:
        self.pieces: list[tuple[Array, Array]] = []

    def predict(self, x: Array) -> Array:
        logits: Array = self.features(x)[0].reshape(len(x), -1) @ self.weight.T
        return logits

    def grams(self, features: tuple[Array, ...]) -> dict[str, dict[str, Array]]:
        x = features[0]
        unfolded = {"c": np.moveaxis(x, 1, 0), "h": np.moveaxis(x, 2, 0), "w": np.moveaxis(x, 3, 0)}
        return {
            "head": {
                letter: (value.reshape(len(value), -1) @ value.reshape(len(value), -1).T)[None]
                for letter, value in unfolded.items()
            }
        }

    def state(self) -> dict[str, Array]:
        return {
            "head.weight": self.weight,
            "optimizer/momentum/head.weight": self.momentum,
            "step": np.array(self.step_number, np.int64),
        }

    def load_state(self, state: Mapping[str, Array]) -> None:
        self.whole = True
        self.weight = state["head.weight"].copy()
        self.momentum = state["optimizer/momentum/head.weight"].copy()
        self.step_number = int(state["step"])


class FakeMeter:
    """A meter that says what ``measure`` returns."""

    def __init__(self, measure: Callable[[], int] = lambda: RUNTIME_BYTES + 20_000) -> None:
        self.measure = measure
        self.resettable: bool | None = True
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1

    def peak_bytes(self) -> int:
        return self.measure()


class Workshop:
    """Makes parts with fakes and remembers the sessions that were made."""

    def __init__(
        self,
        *,
        on_step: Callable[[FakeSession], None] | None = None,
        measure: Callable[[], int] | None = None,
        loss_is_nan: bool = True,
    ) -> None:
        self.sessions: list[FakeSession] = []
        self.on_step, self.loss_is_nan = on_step, loss_is_nan
        self.meter = FakeMeter() if measure is None else FakeMeter(measure)

    @property
    def session(self) -> FakeSession:
        return self.sessions[-1]

    def parts(self, **others: Any) -> Parts:
        """Return the parts; ``others`` are fields of ``Parts``."""

        def factory(bundle: Bundle, plan: Plan, **options: Any) -> FakeSession:
            made = FakeSession(bundle, plan, on_step=self.on_step, loss_is_nan=self.loss_is_nan, **options)
            self.sessions.append(made)
            return made

        return Parts(factory, self.meter, lambda bundle, engine: RUNTIME_BYTES, **others)
