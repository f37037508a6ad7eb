"""A training session: the state of one model in training, whatever the engine. Knows the bundle and the plan.

Parameters, optimizer state and bases live as handles of the runtime; arrays come in and go out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgetune.bundle import Array, Bundle
from edgetune.engines.runtime import Handle, Runtime
from edgetune.errors import DataError, EngineError, UsageError, choices
from edgetune.planning.plan import Plan

ENGINES = ("auto", "onnxruntime")


@dataclass(frozen=True)
class StepReport:
    """What one step did. ``energy`` is the captured energy per lossily saved tensor; ``seconds`` are per phase.

    ``applied`` is False where the loss was not finite: parameters and optimizer state are then as before the step.
    Where ``gradient_norm`` is not finite although the loss was, the step has been applied: go back to a stored state.
    """

    loss: float
    correct: int
    samples: int
    energy: dict[str, float]
    gradient_norm: float
    seconds: dict[str, float] = field(default_factory=dict)
    applied: bool = True


def make_runtime(bundle: Bundle, engine: str) -> Runtime:
    """Return the runtime called ``engine``.

    Raises:
        UsageError: there is none of that name.
        EngineError: its package is not installed.
    """
    if engine not in ENGINES:
        raise UsageError(f"there is no engine '{engine}'; choose one of: {choices(ENGINES)}")
    from edgetune.engines.onnxruntime import OnnxRuntime

    return OnnxRuntime(bundle)


class TrainingSession:
    """Trains the tail of a bundle. Deterministic: same bundle, plan, data and seed give bit-equal states."""

    def __init__(
        self,
        bundle: Bundle,
        plan: Plan,
        *,
        engine: str = "auto",
        hyper: Mapping[str, float] | None = None,
        seed: int = 0,
        verify: bool = True,
    ) -> None:
        """Load graphs and initial weights.

        Args:
            plan: batch, ranks and (by its calibration) bases.
            hyper: values for the optimizer's scalars, such as ``{"learning_rate": 0.01}``.
            verify: prove that the runtime executes the train graph in the emitted order.

        Raises:
            EngineError: no runtime, or one that changes the order.
            UsageError: an unknown hyper-parameter.
        """
        self.bundle = bundle
        self._manifest = bundle.manifest
        self._runtime = make_runtime(bundle, engine)
        self._seed = seed
        self.hyper = dict(self._manifest.optimizer.scalars)
        unknown = set(hyper or {}) - set(self.hyper)
        if unknown:
            raise UsageError(
                f"{self._manifest.optimizer.kind} knows no {choices(unknown)}; it has: {choices(self.hyper)}"
            )
        self.hyper.update(hyper or {})
        self._step = 0
        self._report: StepReport | None = None
        # Copies, because the update writes into these buffers.
        self._parameters = {n: self._runtime.put(v) for n, v in bundle.initial_parameters().items()}
        self._slots = {
            # full, not zeros: memory that the budget counts should be there from the start, not page by page
            f"{slot}/{spec.name}": self._runtime.put(np.full(spec.shape, 0.0, np.float32))
            for spec in self._manifest.parameters
            for slot in self._manifest.optimizer.slots
        }
        self.set_plan(plan)
        for graph in ("train", "update"):
            self._runtime.load(graph)
        if verify:
            self._verify()

    # -- plan -----------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self._plan

    def set_plan(self, plan: Plan) -> None:
        """Put ``plan`` into force: ranks and bases change with the next step; no graph is loaded anew.

        Raises:
            EngineError: the plan is of another codec, or has no bases for a compressed tensor.
        """
        if plan.codec != self._manifest.codec:
            raise EngineError(
                f"the plan is for codec '{plan.codec}', the bundle was exported with '{self._manifest.codec}'"
            )
        self._plan = plan
        self._bases: dict[str, Handle] = {}
        self._sketches: dict[str, tuple[str, int]] = {}
        for saved in self._manifest.saved:
            for mode in saved.modes:
                rank = plan.ranks[saved.name][mode.letter]
                if mode.size is None:
                    self._sketches[mode.input] = saved.name, rank
                    continue
                spectrum = plan.calibration.spectra[saved.name][mode.letter] if plan.calibration else None
                if spectrum is None or spectrum.basis is None:
                    raise EngineError(
                        f"the plan has no basis for '{saved.name}', mode {mode.letter}: plan it with calibration data"
                    )
                self._bases[mode.input] = self._runtime.put(np.ascontiguousarray(spectrum.basis[:, :, :rank]))

    def _basis_feeds(self, samples: int) -> dict[str, Handle]:
        """Return bases and sketches for a batch of ``samples``.

        Every step draws its own sketch: an unlucky one costs energy in one step, not in all. It follows from the seed
        and the step alone, so a resumed session draws the same.
        """
        sketches = {}
        for input_name, (saved, rank) in self._sketches.items():
            rng = np.random.default_rng([self._seed, self._step, *saved.encode()])
            sketches[input_name] = rng.standard_normal((samples, min(rank, samples)), dtype=np.float32)
        return self._bases | {name: self._runtime.put(sketch) for name, sketch in sketches.items()}

    def _verify(self) -> None:
        feeds = {f.name: self._runtime.put(np.zeros((1, *f.shape), np.float32)) for f in self._manifest.features}
        feeds["targets"] = self._runtime.put(np.zeros(1, np.int64))
        self._runtime.verify_order("train", feeds | self._parameters | self._basis_feeds(1))

    # -- running --------------------------------------------------------------------------------------------------

    @property
    def report(self) -> StepReport:
        """The report of the last step."""
        if self._report is None:
            raise EngineError("there is no report before the first step")
        return self._report

    def features(self, x: Array) -> tuple[Array, ...]:
        """Return the trunk's outputs for ``x`` [b, *input], each [b, ...]; ``plan.micro_batch`` samples at once."""
        self._check_inputs(x)
        if "trunk" not in self._manifest.graphs:
            return (np.ascontiguousarray(x, np.float32),)
        spec = self._manifest.graphs["trunk"]
        source = self._manifest.inputs[0].name
        result = {f.name: np.empty((len(x), *f.shape), np.float32) for f in self._manifest.features}
        for start in range(0, len(x), self._plan.micro_batch):
            piece = np.ascontiguousarray(x[start : start + self._plan.micro_batch], np.float32)
            made = self._runtime.run("trunk", {source: self._runtime.put(piece)}, spec.outputs)
            for name, handle in made.items():
                result[name][start : start + len(piece)] = self._runtime.get(handle)
            if source in result:
                result[source][start : start + len(piece)] = piece
        return tuple(result[f.name] for f in self._manifest.features)

    def gradients(self, x: Array, y: Array) -> tuple[float, dict[str, Array]]:
        """Return the loss and its gradient per trained tensor, under the model's own names; nothing is updated."""
        scalars, gradients = self._train(list(self.features(x)), y)
        names = [spec.name for spec in self._manifest.parameters]
        return scalars["loss"], {n: np.array(self._runtime.get(gradients[f"gradient/{n}"])) for n in names}

    def step(self, x: Array, y: Array) -> float:
        """Do one optimizer update on the batch ``x`` [b, *input], ``y`` int64 [b]; return the loss."""
        begin = time.perf_counter()
        features = list(self.features(x))
        return self._step_features(features, y, {"trunk": time.perf_counter() - begin})

    def step_features(self, features: Sequence[Array], y: Array) -> float:
        """Do one optimizer update from the trunk's outputs; return the loss.

        A list is emptied as soon as its tensors are no longer needed, so that a caller who holds them nowhere else
        does not pay for them during the backward pass.
        """
        return self._step_features(features, y, {})

    def _step_features(self, features: Sequence[Array], y: Array, seconds: dict[str, float]) -> float:
        begin = time.perf_counter()
        scalars, gradients = self._train(features, y)
        loss = scalars["loss"]
        energy = {s.name: scalars[s.energy] for s in self._manifest.saved if s.energy is not None}
        seconds["train"] = time.perf_counter() - begin
        begin = time.perf_counter()
        finite = math.isfinite(loss)
        norm = self._update(gradients) if finite else math.nan
        seconds["update"] = time.perf_counter() - begin
        gradients.clear()
        self._runtime.settle()
        self._report = StepReport(loss, round(scalars["correct"]), len(y), energy, norm, seconds, finite)
        return loss

    def _train(self, features: Sequence[Array], y: Array) -> tuple[dict[str, float], dict[str, Handle]]:
        """Run the train graph; return its scalars (loss, correct, energies) and the gradients' handles by output name.

        Scalars are read at once: a handle may keep all that was bound in the same run.
        """
        self._check_targets(features, y)
        feeds = {f.name: self._runtime.put(v) for f, v in zip(self._manifest.features, features, strict=True)}
        feeds["targets"] = self._runtime.put(np.ascontiguousarray(y, np.int64))
        feeds |= self._parameters | self._basis_feeds(len(y))
        graph = self._manifest.graphs["train"]
        scalars: dict[str, float] = {}
        gradients: dict[str, Handle] = {}
        for index, stage in enumerate(graph.run_stages()):
            if index:
                for spec in self._manifest.features:
                    feeds.pop(spec.name, None)
                if isinstance(features, list):
                    features.clear()
            made = self._runtime.run("train", feeds, stage.outputs, stage=index)
            for name in graph.outputs:
                if name in made and name.startswith("gradient/"):
                    gradients[name] = made[name]
                elif name in made:
                    scalars[name] = float(self._runtime.get(made[name]))
            feeds |= made
        return scalars, gradients

    def _update(self, gradients: Mapping[str, Handle]) -> float:
        """Run update.onnx; every new value is written over the old one, which nothing reads any more by then."""
        self._step += 1
        spec = self._manifest.graphs["update"]
        hyper = dict(self.hyper)
        if "step" in hyper:
            hyper["step"] = float(self._step)
        feeds = {**gradients, **self._parameters, **self._slots}
        into = {new: feeds[old] for new, old in spec.in_place.items()}
        feeds |= {name: self._runtime.put(np.array(value, np.float32)) for name, value in hyper.items()}
        return float(self._runtime.get(self._runtime.run("update", feeds, spec.outputs, into)["gradient_norm"]))

    def predict(self, x: Array) -> Array:
        """Return the logits [b, classes] of ``x`` with the present parameters."""
        self._check_inputs(x)
        pieces = range(0, len(x), self._plan.micro_batch)
        made = [self.predict_features(self.features(x[i : i + self._plan.micro_batch])) for i in pieces]
        return np.concatenate(made)

    def predict_features(self, features: Sequence[Array]) -> Array:
        """Return the logits [b, classes] from the trunk's outputs."""
        feeds = {f.name: self._runtime.put(v) for f, v in zip(self._manifest.features, features, strict=True)}
        made = self._runtime.run("predict", feeds | self._parameters, ("logits",))
        return np.array(self._runtime.get(made["logits"]))

    def grams(self, features: Sequence[Array]) -> dict[str, dict[str, Array]]:
        """Return the Gram matrix [groups, n, n] of every mode of every compressed tensor; empty if there is none."""
        result: dict[str, dict[str, Array]] = {s.name: {} for s in self._manifest.saved if s.modes}
        if result:
            feeds = {f.name: self._runtime.put(v) for f, v in zip(self._manifest.features, features, strict=True)}
            outputs = self._manifest.graphs["calibrate"].outputs
            for name, handle in self._runtime.run("calibrate", feeds | self._parameters, outputs).items():
                saved, letter = name.removeprefix("gram/").rsplit("/", 1)
                result[saved][letter] = np.array(self._runtime.get(handle))
        return result

    # -- state ----------------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, Array]:
        """Return copies of all trained tensors."""
        return {name: np.array(self._runtime.get(handle)) for name, handle in self._parameters.items()}

    def state(self) -> dict[str, Array]:
        """Return copies of all that a later session needs to continue bit for bit."""
        slots = {f"optimizer/{name}": np.array(self._runtime.get(handle)) for name, handle in self._slots.items()}
        return self.parameters() | slots | {"step": np.array(self._step, np.int64)}

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Continue from ``state``.

        Raises:
            EngineError: a tensor is missing, or of another shape.
        """
        expected = dict.fromkeys(self._parameters, self._parameters)
        expected |= {f"optimizer/{name}": self._slots for name in self._slots}
        for name, table in expected.items():
            key = name.removeprefix("optimizer/") if table is self._slots else name
            present = self._runtime.get(table[key]).shape
            if name not in state or state[name].shape != present:
                raise EngineError(f"the state does not fit this bundle: '{name}' should have the shape {present}")
        if "step" not in state:
            raise EngineError("the state does not fit this bundle: it has no 'step'")
        for name, table in expected.items():
            key = name.removeprefix("optimizer/") if table is self._slots else name
            table[key] = self._runtime.put(np.array(state[name], np.float32))
        self._step = int(state["step"])

    # -- checks ---------------------------------------------------------------------------------------------------

    def _check_inputs(self, x: Array) -> None:
        expected = self._manifest.inputs[0].shape
        if x.ndim != 1 + len(expected) or tuple(x.shape[1:]) != expected or not len(x):
            raise DataError(f"expected inputs [batch, {', '.join(map(str, expected))}], found {list(x.shape)}")

    def _check_targets(self, features: Sequence[Array], y: Array) -> None:
        classes = self._manifest.logits.shape[0]
        if len(y) > self._plan.batch:
            raise DataError(
                f"a batch of {len(y)} samples exceeds the planned {self._plan.batch}; plan with --batch {len(y)}"
            )
        expected, found = [(len(y), *f.shape) for f in self._manifest.features], [f.shape for f in features]
        if not len(y) or found != expected:
            raise DataError(f"{len(y)} targets need features of the shapes {expected}, found {found}")
        if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
            raise DataError(f"expected targets [batch] of an integer type, found {list(y.shape)} of {y.dtype}")
        if y.min() < 0 or y.max() >= classes:
            raise DataError(f"targets reach from {y.min()} to {y.max()}; the model has the classes 0 to {classes - 1}")
