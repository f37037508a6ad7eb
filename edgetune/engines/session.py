"""A training session: the state of one model in training, whatever the engine. Knows the bundle and the plan.

Parameters, optimizer state and bases live as handles of the runtime; arrays come in and go out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from edgetune.bundle import TRACED, Array, Bundle
from edgetune.engines.calibration import calibrate
from edgetune.engines.choice import make_runtime
from edgetune.engines.codec_inputs import NEXT, CodecInputs
from edgetune.engines.runtime import Handle
from edgetune.errors import DataError, EngineError, UsageError, choices
from edgetune.planning.plan import Plan
from edgetune.planning.rebase import promises, rebased
from edgetune.planning.selection import default_selection, settle

Inputs: TypeAlias = "Array | Mapping[str, Array]"
"""An array [b, ...] for a model with one input, or arrays by the names of the inputs."""


@dataclass(frozen=True)
class StepReport:
    """What one step did. ``energy`` is the captured energy per lossily saved tensor; ``seconds`` are per phase.

    ``correct`` is the number of right answers, None where the model does not classify whole samples.
    ``applied`` is False where the loss or the gradient was not finite (``gradient_norm`` is then NaN): parameters,
    optimizer state and buffers are as before the step.
    """

    loss: float
    correct: int | None
    samples: int
    energy: dict[str, float]
    gradient_norm: float
    seconds: dict[str, float] = field(default_factory=dict)
    applied: bool = True


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
        memory: str = "lean",
        verify: bool = True,
    ) -> None:
        """Load graphs and initial weights.

        Args:
            plan: batch, ranks and (by its calibration) bases.
            hyper: values for the optimizer's scalars, such as ``{"learning_rate": 0.01}``.
            memory: ``lean`` keeps the peak at what the plan predicts; ``fast`` lets the engine take more where that
                saves time (see ``engines.onnxruntime``).
            verify: prove that the runtime executes the train graph in the emitted order.

        Raises:
            EngineError: no runtime, or one that changes the order.
            UsageError: an unknown hyper-parameter, engine or kind of memory.
        """
        self.bundle = bundle
        self._manifest = bundle.manifest
        self._codec_inputs: CodecInputs | None = None
        self._runtime = make_runtime(bundle, engine, memory)
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
        self.phase_ended: Callable[[str], None] | None = None
        """Called in every step when ``train`` and when ``update`` has run, before anything of it is let go."""
        # Copies, because the update writes into these buffers.
        self._parameters = {n: self._runtime.put(v) for n, v in bundle.initial_parameters().items()}
        self._buffers = {n: self._runtime.put(v) for n, v in bundle.initial_buffers().items()}
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
        """Put ``plan`` into force with the next step: new ranks and bases; the train graph is loaded anew only where it
        chooses other codecs.

        Raises:
            EngineError: the plan is of another codec, or has no bases for a compressed tensor.
            UsageError: it chooses a codec that the bundle does not offer.
        """
        if plan.codec != self.bundle.manifest.codec:
            raise EngineError(
                f"the plan is for codec '{plan.codec}', the bundle was exported with '{self.bundle.manifest.codec}'"
            )
        selection = default_selection(self.bundle.manifest) | dict(plan.selection)
        self._manifest = settle(self.bundle.manifest, selection)
        self._runtime.choose(selection)
        self._plan = plan
        self._codec_inputs = CodecInputs(self._manifest, plan, self._runtime, self._seed, self._carried())

    def refresh(self, batches: Iterable[Inputs]) -> Plan:
        """Measure new bases on ``batches`` of inputs, put them into force, and return the plan: ranks and bytes stay.

        For when the captured energy has fallen (``edgetune.Certificate`` tells when); 64 samples do.

        Raises:
            DataError: there is no batch, or an activation is not finite.
            UsageError: no codec in force has bases.
        """
        modes = (mode for saved in self._manifest.saved for mode in saved.modes)
        if not any(mode.source == "basis" for mode in modes):
            raise UsageError("no codec in force has bases to refresh; what it keeps is found anew in every step")
        calibration = calibrate(self, self.bundle.manifest, (self.features(x) for x in batches))
        if calibration is None:
            raise DataError("there is no batch to measure bases on; give one at least")
        self.set_plan(rebased(self.bundle.manifest, self._plan, calibration))
        return self._plan

    @property
    def promises(self) -> dict[str, float]:
        """The captured energy that the plan in force promises, by saved tensor."""
        return promises(self.bundle.manifest, self._plan)

    def _carried(self) -> dict[str, Array]:
        return self._codec_inputs.carried() if self._codec_inputs is not None else {}

    def _verify(self) -> None:
        specs = [*self._manifest.features, self._manifest.targets]
        feeds = {spec.name: self._runtime.put(np.zeros((1, *spec.shape), spec.dtype)) for spec in specs}
        self._runtime.verify_order("train", feeds | self._state_feeds() | self._run_time_inputs(1))

    # -- running --------------------------------------------------------------------------------------------------

    @property
    def report(self) -> StepReport:
        """The report of the last step."""
        if self._report is None:
            raise EngineError("there is no report before the first step")
        return self._report

    def features(self, x: Inputs) -> tuple[Array, ...]:
        """Return the trunk's outputs for ``x``, each [b, ...]; ``plan.micro_batch`` samples at once.

        ``x`` is an array [b, *input], or a mapping from the names of the inputs to such arrays.
        """
        inputs = self._checked_inputs(x)
        samples = len(next(iter(inputs.values())))
        if "trunk" not in self._manifest.graphs:
            return tuple(inputs[f.name] for f in self._manifest.features)
        spec = self._manifest.graphs["trunk"]
        result = {f.name: np.empty((samples, *f.shape), f.dtype) for f in self._manifest.features}
        for start in range(0, samples, self._plan.micro_batch):
            piece = {name: array[start : start + self._plan.micro_batch] for name, array in inputs.items()}
            feeds = {name: self._runtime.put(np.ascontiguousarray(array)) for name, array in piece.items()}
            made = self._runtime.run("trunk", feeds, spec.outputs)
            for name, handle in made.items():
                result[name][start : start + self._plan.micro_batch] = self._runtime.get(handle)
            for name in result.keys() & piece.keys():  # a feature that is an input itself
                result[name][start : start + self._plan.micro_batch] = piece[name]
        return tuple(result[f.name] for f in self._manifest.features)

    def gradients(self, x: Inputs, y: Array) -> tuple[float, dict[str, Array]]:
        """Return the loss and its gradient per trained tensor, under the model's own names; nothing is updated."""
        return self.gradients_from(list(self.features(x)), y)

    def gradients_from(self, features: Sequence[Array], y: Array) -> tuple[float, dict[str, Array]]:
        """Return what :meth:`gradients` does, from the trunk's outputs; a list is emptied (:meth:`step_features`)."""
        scalars, gradients, _, _ = self._train(features, y)
        names = [spec.name for spec in self._manifest.parameters]
        return scalars["loss"], {n: np.array(self._runtime.get(gradients[f"gradient/{n}"])) for n in names}

    def step(self, x: Inputs, y: Array) -> float:
        """Do one optimizer update on the batch ``x`` (see :meth:`features`), ``y`` [b, *target]; return the loss."""
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
        scalars, gradients, buffers, carried = self._train(features, y)
        loss = scalars["loss"]
        energy = {s.name: scalars[s.energy] for s in self._manifest.saved if s.energy is not None}
        seconds["train"] = time.perf_counter() - begin
        if self.phase_ended is not None:
            self.phase_ended("train")
        begin = time.perf_counter()
        finite = math.isfinite(loss) and self._is_finite(gradients)
        norm = self._update(gradients) if finite else math.nan
        if finite:
            self._buffers |= buffers
            assert self._codec_inputs is not None
            self._codec_inputs.carry({name: self._runtime.get(value) for name, value in carried.items()})
        seconds["update"] = time.perf_counter() - begin
        if self.phase_ended is not None:
            self.phase_ended("update")
        gradients.clear()
        self._runtime.settle()
        self._report = StepReport(loss, self._correct(scalars), len(y), energy, norm, seconds, finite)
        return loss

    @staticmethod
    def _correct(scalars: Mapping[str, float]) -> int | None:
        return round(scalars["correct"]) if "correct" in scalars else None

    def _run_time_inputs(self, samples: int) -> dict[str, Handle]:
        assert self._codec_inputs is not None
        return self._codec_inputs.feeds(self._step, samples)

    def _state_feeds(self) -> dict[str, Handle]:
        """Return what a forward pass reads besides the features."""
        return self._parameters | self._buffers

    def _train(
        self, features: Sequence[Array], y: Array
    ) -> tuple[dict[str, float], dict[str, Handle], dict[str, Handle], dict[str, Handle]]:
        """Run the train graph; return its scalars (loss, correct, energies), the gradients' handles by output name, the
        new buffers by name, and by input name what codecs carry to the next step.

        Scalars are read at once: a handle may keep all that was bound in the same run.
        """
        y = self._checked_targets(features, y)
        feeds = {f.name: self._runtime.put(v) for f, v in zip(self._manifest.features, features, strict=True)}
        feeds[self._manifest.targets.name] = self._runtime.put(y)
        feeds |= self._state_feeds() | self._run_time_inputs(len(y))
        graph = self._manifest.graphs["train"]
        scalars: dict[str, float] = {}
        gradients: dict[str, Handle] = {}
        buffers: dict[str, Handle] = {}
        carried: dict[str, Handle] = {}
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
                elif name in made and name.startswith("new/"):
                    buffers[name.removeprefix("new/")] = made[name]
                elif name in made and name.startswith(NEXT):
                    carried[name.removeprefix(NEXT)] = made[name]
                elif name in made:
                    scalars[name] = float(self._runtime.get(made[name]))
            feeds |= made
        return scalars, gradients, buffers, carried

    def _is_finite(self, gradients: Mapping[str, Handle]) -> bool:
        """Return whether the norm of the gradient is finite, before an update overwrites what it starts from."""
        # A product with itself has no temporary of the tensor's size, and on a CPU the array is a view.
        flat = (self._runtime.get(handle).reshape(-1) for handle in gradients.values())
        return all(math.isfinite(np.vdot(values, values)) for values in flat)

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

    def predict(self, x: Inputs) -> Array:
        """Return the model's first output [b, ...] for ``x`` (see :meth:`features`) with the present parameters."""
        return self.outputs(x)[self._manifest.outputs[0].name]

    def outputs(self, x: Inputs) -> dict[str, Array]:
        """Return all outputs of the model for ``x``, each [b, ...], by their names."""
        inputs = self._checked_inputs(x)
        samples, size = len(next(iter(inputs.values()))), self._plan.micro_batch
        pieces = ({n: a[i : i + size] for n, a in inputs.items()} for i in range(0, samples, size))
        made = [self._outputs_from(self.features(piece)) for piece in pieces]
        return {spec.name: np.concatenate([part[spec.name] for part in made]) for spec in self._manifest.outputs}

    def predict_features(self, features: Sequence[Array]) -> Array:
        """Return the model's first output [b, ...] from the trunk's outputs."""
        return self._outputs_from(features)[self._manifest.outputs[0].name]

    def _outputs_from(self, features: Sequence[Array]) -> dict[str, Array]:
        feeds = {f.name: self._runtime.put(v) for f, v in zip(self._manifest.features, features, strict=True)}
        wanted = {f"output/{spec.name}": spec.name for spec in self._manifest.outputs}
        made = self._runtime.run("predict", feeds | self._state_feeds(), tuple(wanted))
        return {wanted[name]: np.array(self._runtime.get(handle)) for name, handle in made.items()}

    def grams(self, features: Sequence[Array]) -> dict[str, dict[str, Array]]:
        """Return the Gram matrix [groups, n, n] of every mode of every compressed tensor; empty if there is none."""
        manifest = self.bundle.manifest  # whatever the plan chose: every codec of the menu is calibrated
        result: dict[str, dict[str, Array]] = {
            s.name: {} for s in manifest.saved if any(mode.spectrum for mode in s.modes)
        }
        if result:
            feeds = {f.name: self._runtime.put(v) for f, v in zip(self._manifest.features, features, strict=True)}
            outputs = self._manifest.graphs["calibrate"].outputs
            for name, handle in self._runtime.run("calibrate", feeds | self._state_feeds(), outputs).items():
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
        buffers = {f"buffer/{name}": np.array(self._runtime.get(handle)) for name, handle in self._buffers.items()}
        carried = {f"carried/{name}": value for name, value in self._carried().items()}
        return self.parameters() | slots | buffers | carried | {"step": np.array(self._step, np.int64)}

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Continue from ``state``.

        Raises:
            EngineError: a tensor is missing, or of another shape.
        """
        places = {name: (self._parameters, name) for name in self._parameters}
        places |= {f"optimizer/{name}": (self._slots, name) for name in self._slots}
        places |= {f"buffer/{name}": (self._buffers, name) for name in self._buffers}
        for name, (table, key) in places.items():
            present = self._runtime.get(table[key]).shape
            if name not in state or state[name].shape != present:
                raise EngineError(f"the state does not fit this bundle: '{name}' should have the shape {present}")
        if "step" not in state:
            raise EngineError("the state does not fit this bundle: it has no 'step'")
        for name, (table, key) in places.items():
            table[key] = self._runtime.put(np.array(state[name], np.float32))
        assert self._codec_inputs is not None
        prefix = "carried/"
        self._codec_inputs.carry({n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)})
        self._step = int(state["step"])

    # -- checks ---------------------------------------------------------------------------------------------------

    def _checked_inputs(self, x: Inputs) -> dict[str, Array]:
        """Return the inputs by name, each contiguous and of its type."""
        specs = {spec.name: spec for spec in self._manifest.inputs}
        given = x if isinstance(x, Mapping) else {next(iter(specs)): x}
        if given.keys() != specs.keys():
            raise DataError(f"expected the inputs {choices(specs)}; found {choices(given)}")
        for name, spec in specs.items():
            array = given[name]
            if array.ndim != 1 + len(spec.shape) or tuple(array.shape[1:]) != spec.shape or not len(array):
                expected = ", ".join(map(str, ("batch", *spec.shape)))
                raise DataError(f"expected input '{name}' [{expected}], found {list(array.shape)}")
        if len({len(array) for array in given.values()}) > 1:
            raise DataError(f"inputs of different batches: { {name: len(array) for name, array in given.items()} }")
        return {name: np.ascontiguousarray(given[name], spec.dtype) for name, spec in specs.items()}

    def _checked_targets(self, features: Sequence[Array], y: Array) -> Array:
        """Return the targets, contiguous and of their type."""
        if len(y) > self._plan.batch:
            raise DataError(
                f"a batch of {len(y)} samples exceeds the planned {self._plan.batch}; plan with --batch {len(y)}"
            )
        expected, found = [(len(y), *f.shape) for f in self._manifest.features], [f.shape for f in features]
        if not len(y) or found != expected:
            raise DataError(f"{len(y)} targets need features of the shapes {expected}, found {found}")
        spec = self._manifest.targets
        whole = np.issubdtype(np.dtype(spec.dtype), np.integer)
        if y.shape[1:] != spec.shape or (whole and not np.issubdtype(y.dtype, np.integer)):
            shape = ", ".join(map(str, ("batch", *spec.shape)))
            kind = "an integer type" if whole else spec.dtype
            raise DataError(f"expected targets [{shape}] of {kind}, found {list(y.shape)} of {y.dtype}")
        self._check_labels(y)
        return np.ascontiguousarray(y, spec.dtype)

    def _check_labels(self, y: Array) -> None:
        """Raise DataError if a label is none of the classes (nor the label to be ignored)."""
        if self._manifest.loss.kind == TRACED or not np.issubdtype(y.dtype, np.integer):
            return
        ignored = self._manifest.loss.config.get("ignore_index")
        counted = y if ignored is None else y[y != ignored]
        classes = max(2, self._manifest.outputs[0].shape[0])  # a single output is one of two classes
        if counted.size and (counted.min() < 0 or counted.max() >= classes):
            raise DataError(
                f"targets reach from {counted.min()} to {counted.max()}; the model has the classes 0 to {classes - 1}"
            )
