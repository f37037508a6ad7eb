"""A training session: the state of one model in training, whatever the engine. Knows the bundle and the plan.

Parameters, optimizer state and bases live as handles of the runtime; arrays come in and go out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgetune.bundle import Array, Bundle
from edgetune.engines.calibration import calibrate
from edgetune.engines.checks import Inputs, checked_inputs, checked_targets
from edgetune.engines.choice import make_runtime
from edgetune.engines.codec_inputs import CodecInputs
from edgetune.engines.pieces import Accumulation, Made, mass_of, run_train, slices
from edgetune.engines.runtime import Handle
from edgetune.engines.state import TrainedState
from edgetune.errors import DataError, EngineError, UsageError, choices
from edgetune.planning.freezing import narrow
from edgetune.planning.knobs import check_splits, check_trained
from edgetune.planning.plan import Plan
from edgetune.planning.rebase import promises, rebased
from edgetune.planning.selection import default_selection, settle


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
        memory: str | None = None,
        verify: bool = True,
    ) -> None:
        """Load graphs and initial weights.

        Args:
            plan: batch, ranks and (by its calibration) bases.
            hyper: values for the optimizer's scalars, such as ``{"learning_rate": 0.01}``.
            memory: ``lean`` or ``fast`` in the place of what the plan says (``Plan.memory``).
            verify: prove that the runtime executes the train graph in the emitted order.

        Raises:
            EngineError: no runtime, or one that changes the order.
            UsageError: an unknown hyper-parameter, engine or kind of memory.
        """
        if memory not in (None, "lean", "fast"):
            raise UsageError(f"memory '{memory}' is unknown; choose one of: lean, fast (or none: as the plan says)")
        self.bundle = bundle
        self._manifest = bundle.manifest
        self._codec_inputs: CodecInputs | None = None
        self._runtime, self._memory = make_runtime(bundle, engine), memory
        self._seed = seed
        self.hyper = dict(self._manifest.optimizer.scalars)
        unknown = set(hyper or {}) - set(self.hyper)
        if unknown:
            raise UsageError(
                f"{self._manifest.optimizer.kind} knows no {choices(unknown)}; it has: {choices(self.hyper)}"
            )
        self.hyper.update(hyper or {})
        self._report: StepReport | None = None
        self.phase_ended: Callable[[str], None] | None = None
        """Called in every step when ``train`` (of each piece) and ``update`` have run, before anything is let go."""
        self._open: Accumulation | None = None
        self._whole = True
        self._before: dict[str, Array] | None = None  # what codecs carried before the step that is open
        self._seconds: dict[str, float] = {}
        self._state = TrainedState(bundle, self._runtime)
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
        chooses other codecs. Pieces of a step that was not finished are forgotten.

        Raises:
            EngineError: the plan is of another codec, or has no bases for a compressed tensor.
            UsageError: it chooses a codec that the bundle does not offer, or trains in pieces what has to be whole.
        """
        if plan.codec != self.bundle.manifest.codec:
            raise EngineError(
                f"the plan is for codec '{plan.codec}', the bundle was exported with '{self.bundle.manifest.codec}'"
            )
        if plan.tail_micro_batch < plan.batch:
            check_splits(self.bundle.manifest)
        check_trained(self.bundle.manifest, plan.trained)
        self.discard()
        selection = default_selection(self.bundle.manifest) | dict(plan.selection)
        self._manifest = settle(narrow(self.bundle.manifest, plan.trained).manifest, selection)
        self._runtime.limit(None if plan.budget_bytes is None else plan.budget_bytes - plan.ledger["runtime"])
        self._runtime.pack((self._memory or plan.memory) == "fast")
        self._runtime.choose(selection, plan.trained)
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
        calibration = calibrate(self, self.bundle.manifest, self._features_by_piece(batches))
        if calibration is None:
            raise DataError("there is no batch to measure bases on; give one at least")
        self.set_plan(rebased(self.bundle.manifest, self._plan, calibration))
        return self._plan

    def _features_by_piece(self, batches: Iterable[Inputs]) -> Iterator[tuple[Array, ...]]:
        for x in batches:
            inputs = checked_inputs(self._manifest, x)
            for piece in slices(len(next(iter(inputs.values()))), self._plan.tail_micro_batch):
                yield self.features({name: array[piece] for name, array in inputs.items()})

    @property
    def promises(self) -> dict[str, float]:
        """The captured energy that the plan in force promises, by saved tensor."""
        return promises(self.bundle.manifest, self._plan)

    def _carried(self) -> dict[str, Array]:
        return self._codec_inputs.carried() if self._codec_inputs is not None else {}

    def _verify(self) -> None:
        specs = [*self._manifest.features, self._manifest.targets]
        feeds = {spec.name: self._runtime.put(np.zeros((1, *spec.shape), spec.dtype)) for spec in specs}
        self._runtime.verify_order("train", feeds | self._state.feeds() | self._run_time_inputs(1))

    # -- running --------------------------------------------------------------------------------------------------

    @property
    def report(self) -> StepReport:
        """The report of the last step."""
        if self._report is None:
            raise EngineError("there is no report before the first step")
        return self._report

    @property
    def whole(self) -> bool:
        """Whether the state is that before or after a step: not while, or after, an update was broken off."""
        return self._whole

    def features(self, x: Inputs) -> tuple[Array, ...]:
        """Return the trunk's outputs for ``x``, each [b, ...]; ``plan.micro_batch`` samples at once.

        ``x`` is an array [b, *input], or a mapping from the names of the inputs to such arrays.
        """
        inputs = checked_inputs(self._manifest, x)
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
        return self._only_gradients(self._pieces_of(x, y))

    def gradients_from(self, features: Sequence[Array], y: Array) -> tuple[float, dict[str, Array]]:
        """Return what :meth:`gradients` does, from the trunk's outputs; a list is emptied (:meth:`step_features`)."""
        return self._only_gradients(self._pieces_from(features, y))

    def _only_gradients(self, pieces: Iterable[tuple[list[Array], Array]]) -> tuple[float, dict[str, Array]]:
        self.discard()
        for features, y in pieces:
            self.add(features, y)
        done = self._opened()
        self.discard()
        return done.loss, done.arrays()

    def step(self, x: Inputs, y: Array) -> float:
        """Do one optimizer update on the batch ``x`` (see :meth:`features`), ``y`` [b, *target]; return the loss.

        Of a batch that is planned to be trained in pieces, the features of one piece are in memory at a time.
        """
        return self._update_from(self._pieces_of(x, y))

    def step_features(self, features: Sequence[Array], y: Array) -> float:
        """Do one optimizer update from the trunk's outputs; return the loss.

        A list is emptied as soon as its tensors are no longer needed, so that a caller who holds them nowhere else
        does not pay for them during the backward pass.
        """
        return self._update_from(self._pieces_from(features, y))

    def _update_from(self, pieces: Iterable[tuple[list[Array], Array]]) -> float:
        self.discard()
        for features, y in pieces:
            self.add(features, y)
        return self.finish()

    def _pieces_of(self, x: Inputs, y: Array) -> Iterator[tuple[list[Array], Array]]:
        """Yield features and targets of one piece after the other."""
        inputs = checked_inputs(self._manifest, x)
        samples = len(next(iter(inputs.values())))
        if samples != len(y):
            raise DataError(f"{samples} samples with {len(y)} targets; expected as many")
        for piece in slices(samples, self._plan.tail_micro_batch):
            begin = time.perf_counter()
            features = list(self.features({name: array[piece] for name, array in inputs.items()}))
            self._seconds["trunk"] = self._seconds.get("trunk", 0.0) + time.perf_counter() - begin
            yield features, y[piece]

    def _pieces_from(self, features: Sequence[Array], y: Array) -> Iterator[tuple[list[Array], Array]]:
        whole = list(features)
        if isinstance(features, list):
            features.clear()
        checked_targets(self._manifest, whole, y)
        if len(y) <= self._plan.tail_micro_batch:
            yield whole, y
            return
        for piece in slices(len(y), self._plan.tail_micro_batch):
            yield [array[piece] for array in whole], y[piece]

    # -- a step in pieces -----------------------------------------------------------------------------------------

    def add(self, features: Sequence[Array], y: Array) -> None:
        """Train on one piece of a step, from the trunk's outputs (a list is emptied): forward, backward, and its
        gradient is added to those of the pieces before. :meth:`finish` makes the update.

        The pieces of a step have at most ``plan.tail_micro_batch`` samples each and ``plan.batch`` together, and give
        the gradient of all of them as one batch, but for rounding and for what lossy codecs lose of a piece.

        Raises:
            DataError: more samples than planned, or what does not suit the bundle.
            EngineError: the runtime failed. Nothing of the step is left: begin it again.
        """
        try:
            self._add(features, y)
        except BaseException:
            self.discard()
            raise

    def finish(self) -> float:
        """Do the optimizer update of the pieces that were added; return the loss of all.

        Where it, or the gradient, is not finite, nothing is applied; the report says so.

        Raises:
            EngineError: no piece was added.
        """
        done = self._opened()
        begin = time.perf_counter()
        finite = math.isfinite(done.loss) and done.is_finite()
        norm = math.nan
        if finite:
            self._whole = False
            norm = self._update(done.gradients)
            self._state.buffers |= done.buffers
            self._before = None  # what codecs carry stays
            self._whole = True
        self._seconds["update"] = time.perf_counter() - begin
        self._ended("update")
        correct = round(done.correct) if "correct" in self._manifest.graphs["train"].outputs else None
        self._report = StepReport(done.loss, correct, done.samples, done.energy, norm, dict(self._seconds), finite)
        self.discard()
        self._runtime.settle()
        return done.loss

    def _ended(self, phase: str) -> None:
        if self.phase_ended is not None:
            self.phase_ended(phase)

    def discard(self) -> None:
        """Forget the pieces of a step that was not finished."""
        if self._before is not None and self._codec_inputs is not None:
            self._codec_inputs.restore(self._before)
        self._open, self._before = None, None
        self._seconds = {}

    def _opened(self) -> Accumulation:
        if self._open is None:
            raise EngineError("there is no step to finish: add a piece of it first")
        return self._open

    def _add(self, features: Sequence[Array], y: Array) -> None:
        plan, done = self._plan, self._open
        added = 0 if done is None else done.samples
        if len(y) + added > plan.batch:
            raise DataError(
                f"a batch of {len(y) + added} samples exceeds the planned {plan.batch}; plan with --batch "
                f"{len(y) + added}"
            )
        if len(y) > plan.tail_micro_batch or (added and plan.tail_micro_batch == plan.batch):
            raise DataError(
                f"a piece of {len(y)} samples after {added}: the batch of {plan.batch} is planned to be trained by "
                f"{plan.tail_micro_batch} at a time (--tail-micro-batch)"
            )
        assert self._codec_inputs is not None
        if done is None:
            done = self._open = Accumulation(self._manifest, self._runtime)
            self._before = self._codec_inputs.carried()
        begin = time.perf_counter()
        targets = checked_targets(self._manifest, features, y)
        in_pieces = plan.tail_micro_batch < plan.batch
        mass = mass_of(self._manifest, targets) if in_pieces else 1.0
        if mass > 0:
            made = self._train(features, targets, done.pieces)
            self._codec_inputs.carry({name: self._runtime.get(value) for name, value in made.carried.items()})
            done.add(made, len(y), mass)
        else:
            done.skip(len(y))
        self._ended("train")
        if isinstance(features, list):
            features.clear()
        if in_pieces:
            self._runtime.settle()
        self._seconds["train"] = self._seconds.get("train", 0.0) + time.perf_counter() - begin

    def _run_time_inputs(self, samples: int, piece: int = 0) -> dict[str, Handle]:
        assert self._codec_inputs is not None
        return self._codec_inputs.feeds(self._state.step, samples, piece)

    def _train(self, features: Sequence[Array], targets: Array, piece: int = 0) -> Made:
        fixed = self._state.feeds() | self._run_time_inputs(len(targets), piece)
        return run_train(self._manifest, self._runtime, features, targets, fixed)

    def _update(self, gradients: Mapping[str, Handle]) -> float:
        return self._state.update(self._manifest.graphs["update"], gradients, self.hyper)

    def predict(self, x: Inputs) -> Array:
        """Return the model's first output [b, ...] for ``x`` (see :meth:`features`) with the present parameters."""
        return self.outputs(x)[self._manifest.outputs[0].name]

    def outputs(self, x: Inputs) -> dict[str, Array]:
        """Return all outputs of the model for ``x``, each [b, ...], by their names."""
        inputs = checked_inputs(self._manifest, x)
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
        made = self._runtime.run("predict", feeds | self._state.feeds(), tuple(wanted))
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
            for name, handle in self._runtime.run("calibrate", feeds | self._state.feeds(), outputs).items():
                saved, letter = name.removeprefix("gram/").rsplit("/", 1)
                result[saved][letter] = np.array(self._runtime.get(handle))
        return result

    # -- state ----------------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, Array]:
        """Return copies of all trained tensors."""
        return {name: np.array(self._runtime.get(handle)) for name, handle in self._state.parameters.items()}

    def state(self) -> dict[str, Array]:
        """Return copies of all that a later session needs to continue bit for bit."""
        carried = self._carried() if self._before is None else self._before
        return self._state.copies() | {f"carried/{name}": value for name, value in carried.items()}

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Continue from ``state``. Pieces of a step that was not finished are forgotten.

        Raises:
            EngineError: a tensor is missing, or of another shape.
        """
        self.discard()
        self._state.load(state)
        assert self._codec_inputs is not None
        prefix = "carried/"
        self._codec_inputs.restore({n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)})
        self._whole = True
