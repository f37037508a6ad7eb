"""A bundle and a plan -> training, eval and optimizer model and checkpoint, as ``onnxruntime.training.api`` reads them.

The conventions are those of Microsoft's own ``onnxruntime.training.artifacts`` (release 1.19): inputs of a model are
what the user gives, then the checkpoint's parameters by name, then per trained parameter a buffer into which
``InPlaceAccumulatorV2`` adds its gradient, then ``lazy_reset_grad``. The training API gives parameters by place, not by
name, so the eval model takes the same ones in the same order, read or not.

What differs from our own engines: the trunk is part of the training model and runs with the whole batch, the runtime
chooses the order of execution, and the sketch of the batch mode is drawn once, not for every step. The learning rate
is not part of any artifact (a new ``Optimizer`` of release 1.19 starts with 0.001, whatever the checkpoint says), so
the checkpoint has it as a property: ``optimizer.set_learning_rate(state.properties["edgetune.learning_rate"])``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from edgetune.autodiff.graph import BATCH
from edgetune.bundle import Array, Bundle
from edgetune.errors import ExportError, UsageError, choices
from edgetune.export.ort_training.checkpoint import Checkpoint
from edgetune.export.ort_training.graphs import MICROSOFT, Joined, make_model
from edgetune.planning.plan import Plan
from edgetune.version import __version__

TRAINING, EVAL, OPTIMIZER, CHECKPOINT = "training_model.onnx", "eval_model.onnx", "optimizer_model.onnx", "checkpoint"
FROZEN_WEIGHTS = "frozen_weights.bin"  # only where they are too many for a graph
FILES = (TRAINING, EVAL, OPTIMIZER, CHECKPOINT, FROZEN_WEIGHTS)

MOST_EMBEDDED_BYTES = 1 << 30
_KINDS = ("feature", "target", "parameter", "basis")
_RESET = "lazy_reset_grad"
_LOSS, _GRADIENT = "loss", "gradient/"
_ADAMW_AS_TORCH = 0
"""The ``adam_mode`` that decays the parameter before the step and adds epsilon to the unbiased root, as
``torch.optim.AdamW`` and our update.onnx do; 1 is Hugging Face's, which Microsoft's own artifacts use."""


def write_ort_training(
    bundle: Bundle,
    plan: Plan,
    directory: Path,
    *,
    hyper: Mapping[str, float] | None = None,
    seed: int = 0,
    embed_bytes: int = MOST_EMBEDDED_BYTES,
) -> None:
    """Write ``bundle`` to ``directory`` as artifacts of onnxruntime-training.

    ``Module(x, y)`` returns the loss; in evaluation mode the loss and the outputs of predict.onnx. A batch may be
    shorter than ``plan.batch`` but, where the codec truncates the batch mode, not longer. The checkpoint's properties
    are ``edgetune.version``, ``edgetune.codec``, ``edgetune.batch`` and ``edgetune.learning_rate``.

    Args:
        plan: batch, ranks and (by its calibration) bases; bases and sketches become frozen parameters.
        hyper: values for the optimizer's scalars, in the place of the bundle's.
        seed: of the sketches, which are those of the first step of a ``TrainingSession`` of this seed.
        embed_bytes: frozen weights beyond this size lie in a file of their own, beside which a model must then lie
            that ``Module.export_model_for_inferencing`` writes.

    Raises:
        UsageError: an optimizer or a setting that the training API has not, or ``directory`` holds other files.
        ExportError: a plan for another bundle or without bases; state that the training API cannot keep.
    """
    directory = Path(directory)
    _check_replaceable(directory)
    optimizer, rate = _optimizer(bundle, hyper or {})
    frozen = _frozen(bundle, plan, seed)
    parts = _Parts.of(bundle, frozen)
    checkpoint = Checkpoint(
        parts.trained,
        frozen,
        {
            "edgetune.version": __version__,
            "edgetune.codec": plan.codec,
            "edgetune.batch": plan.batch,
            "edgetune.learning_rate": rate,
        },
    ).to_bytes()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".export-") as scratch:
        root = Path(scratch) / "artifacts"
        root.mkdir()
        weights = _Weights(bundle.path, root, embed_bytes)
        weights.save({TRAINING: parts.training(), EVAL: parts.evaluation()})
        onnx.save_model(optimizer, root / OPTIMIZER)
        (root / CHECKPOINT).write_bytes(checkpoint)
        if directory.exists():
            directory.rename(Path(scratch) / "old")  # goes with the scratch directory
        root.rename(directory)


def _check_replaceable(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UsageError(f"'{directory}' is a file; choose another place for the output")
    foreign = sorted(path.name for path in directory.iterdir() if path.name not in FILES)
    if foreign:
        raise UsageError(
            f"'{directory}' holds more than ort-training artifacts ({', '.join(foreign[:5])}); choose another place"
        )


def _optimizer(bundle: Bundle, hyper: Mapping[str, float]) -> tuple[onnx.ModelProto, float]:
    """Return the optimizer model and the learning rate."""
    spec = bundle.manifest.optimizer
    scalars = dict(spec.scalars)
    unknown = set(hyper) - set(scalars)
    if unknown:
        raise UsageError(f"{spec.kind} knows no {choices(unknown)}; it has: {choices(scalars)}")
    scalars.update(hyper)
    if scalars.get("clip_norm"):
        raise UsageError(
            f"the target ort-training does not clip gradients, but clip_norm is {scalars['clip_norm']}; set it to 0"
        )
    vectors = ["params", "gradients"]
    inputs = [
        helper.make_tensor_value_info("learning_rate", TensorProto.FLOAT, [1]),
        helper.make_tensor_value_info("step", TensorProto.INT64, [1]),
    ]
    if spec.kind == "adamw":
        moments = ["first_order_moments", "second_order_moments"]
        node = helper.make_node(
            "AdamWOptimizer", ["learning_rate", "step", *vectors, *moments], ["updated"], domain=MICROSOFT,
            alpha=scalars["beta1"], beta=scalars["beta2"], epsilon=scalars["epsilon"],
            weight_decay=scalars["weight_decay"], correct_bias=1, adam_mode=_ADAMW_AS_TORCH,
        )  # fmt: skip
    elif spec.kind == "sgd":
        for name in ("momentum", "weight_decay"):
            if scalars[name]:
                raise UsageError(
                    f"onnxruntime-training's SGD has no {name}, but it is {scalars[name]}: set momentum and "
                    "weight_decay to 0, or export the bundle with the optimizer adamw"
                )
        # it reads none, but the training API keeps one and gives it
        moments = ["first_order_moments"]
        node = helper.make_node("SGDOptimizerV2", ["learning_rate", *vectors], ["updated"], domain=MICROSOFT)
    else:
        raise UsageError(f"the target ort-training has no optimizer '{spec.kind}'; export with one of: adamw, sgd")
    inputs += [helper.make_tensor_sequence_value_info(name, TensorProto.FLOAT, None) for name in [*vectors, *moments]]
    # release 1.19 infers these shapes; another would bring a warning with every load
    output = helper.make_tensor_value_info("updated", TensorProto.BOOL, [1] if spec.kind == "adamw" else [])
    model = make_model(helper.make_graph([node], "optimizer", inputs, [output]))
    return model, float(scalars["learning_rate"])


def _frozen(bundle: Bundle, plan: Plan, seed: int) -> dict[str, Array]:
    """Return bases [groups, size, rank] and sketches [plan.batch, rank] by graph input."""
    if plan.codec != bundle.manifest.codec:
        raise ExportError(
            f"the plan is for codec '{plan.codec}', the bundle was exported with '{bundle.manifest.codec}'"
        )
    odd = {m.source for s in bundle.manifest.saved for m in s.modes} - {"basis", "sketch"}
    if odd or bundle.manifest.graphs["train"].choices:
        raise ExportError(
            f"the target ort-training takes one codec whose run-time inputs may stay the same in every step, not "
            f"'{bundle.manifest.codec}'; export with --codec dense, hosvd, hosvd-exact, svd or recompute"
        )
    result: dict[str, Array] = {}
    for saved in bundle.manifest.saved:
        for mode in saved.modes:
            rank = plan.ranks[saved.name][mode.letter]
            if mode.source == "sketch":
                which = b"" if mode.letter == "b" else mode.letter.encode()
                rng = np.random.default_rng([seed, 0, *saved.name.encode(), *which])
                size = plan.batch if mode.size is None else mode.size
                result[mode.input] = rng.standard_normal((size, min(rank, size)), dtype=np.float32)
                continue
            spectrum = plan.calibration.spectra[saved.name][mode.spectrum] if plan.calibration else None
            if spectrum is None or spectrum.basis is None:
                raise ExportError(
                    f"the plan has no basis for '{saved.name}', mode {mode.letter}: plan it with calibration data"
                )
            result[mode.input] = np.ascontiguousarray(spectrum.basis[:, :, :rank], np.float32)
    return result


@dataclass(frozen=True)
class _Parts:
    """The bundle's graphs, without the data of their weights, and what the training API keeps for them."""

    graphs: Mapping[str, onnx.GraphProto]
    users: Mapping[str, onnx.ValueInfoProto]
    trained: Mapping[str, Array]
    frozen: Mapping[str, Array]
    sketches: tuple[str, ...]

    @staticmethod
    def of(bundle: Bundle, frozen: Mapping[str, Array]) -> _Parts:
        """Read the graphs.

        Raises:
            ExportError: the train graph has an input, or an operator, that keeps a state of another kind.
        """
        specs = bundle.manifest.graphs
        graphs = {
            name: onnx.load(bundle.path / specs[name].flat_file, load_external_data=False).graph
            for name in ("trunk", "train", "predict")
            if name in specs
        }
        kinds = {use.name: use.kind for use in specs["train"].tensors}
        values = {value.name: value for name in ("trunk", "train") if name in graphs for value in graphs[name].input}
        for value in graphs["train"].input:
            if kinds[value.name] not in _KINDS:
                raise ExportError(
                    f"the train graph reads '{value.name}' of the kind '{kinds[value.name]}', which onnxruntime-"
                    "training cannot keep from step to step; for the target ort-training, train with batch-norm frozen"
                )
        targets = [value.name for value in graphs["train"].input if kinds[value.name] == "target"]
        users = {n: values[n] for n in [*(s.name for s in bundle.manifest.inputs), *targets] if n in values}
        sketches = tuple(m.input for s in bundle.manifest.saved for m in s.modes if m.size is None)
        return _Parts(graphs, users, bundle.initial_parameters(), frozen, sketches)

    def training(self) -> onnx.ModelProto:
        """Return trunk, forward and backward pass and the accumulation of gradients as one model."""
        gradients = {name: f"{name}_grad" for name in self.trained}
        buffers = {name: f"{gradient}.accumulation.buffer" for name, gradient in gradients.items()}
        joined = self._joined([*gradients.values(), *buffers.values(), _RESET])
        made = joined.add(self.graphs["train"], self._shortened_sketches(joined))
        joined.expose({_LOSS: made[_LOSS]} | {gradients[name]: made[_GRADIENT + name] for name in self.trained})
        outputs = [self._output("train", _LOSS)]
        for name, gradient in gradients.items():
            reads = [buffers[name], gradient, _RESET]
            done = joined.op("InPlaceAccumulatorV2", reads, f"{gradient}.accumulation.out", domain=MICROSOFT)
            outputs.append(helper.make_tensor_value_info(done, TensorProto.BOOL, [1]))
        joined.keep_only(value.name for value in outputs)
        accumulated = [
            helper.make_tensor_value_info(buffers[name], TensorProto.FLOAT, list(value.shape))
            for name, value in self.trained.items()
        ]
        reset = helper.make_tensor_value_info(_RESET, TensorProto.BOOL, [1])
        return joined.model("training", [*self._inputs(), *accumulated, reset], outputs)

    def evaluation(self) -> onnx.ModelProto:
        """Return trunk, prediction and loss as one model, what loss and prediction share computed once."""
        # predict.onnx keeps its outputs apart by a prefix; here they are called as the model calls them.
        predicted = {value.name.removeprefix("output/"): value.name for value in self.graphs["predict"].output}
        joined = self._joined(predicted)
        made = joined.add(self.graphs["train"], merge_equal=True)
        made |= joined.add(self.graphs["predict"], merge_equal=True)
        joined.expose({_LOSS: made[_LOSS]} | {public: made[name] for public, name in predicted.items()})
        outputs = [self._output("train", _LOSS)]
        for public, name in predicted.items():
            output = onnx.ValueInfoProto()
            output.CopyFrom(self._output("predict", name))
            output.name = public
            outputs.append(output)
        joined.keep_only(value.name for value in outputs)
        return joined.model("evaluation", self._inputs(), outputs)

    def _joined(self, names: Iterable[str]) -> Joined:
        """Return the trunk, with ``names`` and those of all inputs kept free."""
        joined = Joined()
        joined.reserve([_LOSS, *names, *self.users, *self.trained, *self.frozen])
        if "trunk" in self.graphs:
            made = joined.add(self.graphs["trunk"])
            assert all(name == now for name, now in made.items())  # the first to come keeps its names
        return joined

    def _inputs(self) -> list[onnx.ValueInfoProto]:
        kept = {**self.trained, **self.frozen}
        parameters = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), list(v.shape))
            for n, v in kept.items()
        ]
        return [*self.users.values(), *parameters]

    def _output(self, graph: str, name: str) -> onnx.ValueInfoProto:
        values: dict[str, onnx.ValueInfoProto] = {value.name: value for value in self.graphs[graph].output}
        return values[name]

    def _shortened_sketches(self, joined: Joined) -> dict[str, str]:
        """Cut every sketch to the present batch [b, min(rank, b)]; return the cut one by the name of the whole."""
        if not self.sketches:
            return {}
        source, axis = self._batch_axis()
        zero = joined.constant(numpy_helper.from_array(np.zeros(2, np.int64), "sketch.start"))
        batch = joined.op("Shape", [source], "sketch.batch", start=axis, end=axis + 1)
        end = joined.op("Concat", [batch, batch], "sketch.end", axis=0)
        return {name: joined.op("Slice", [name, zero, end], f"{name}.now") for name in self.sketches}

    def _batch_axis(self) -> tuple[str, int]:
        """Return an input of the user and its axis whose extent is the batch."""
        for value in self.users.values():
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if dim.dim_param == BATCH:
                    return value.name, axis
        raise ExportError("no input of the model has the batch as the extent of an axis")


class _Weights:
    """Brings the frozen weights from the bundle's file into the models, or into one file that all of them share."""

    def __init__(self, source: Path, root: Path, embed_bytes: int) -> None:
        self._source, self._root, self._embed_bytes = source, root, embed_bytes

    def save(self, models: Mapping[str, onnx.ModelProto]) -> None:
        """Save ``models`` by file name; all of them with their weights inside, or all of them without."""
        apart = any(
            sum(external_data_helper.ExternalDataInfo(t).length or 0 for t in _external(m)) > self._embed_bytes
            for m in models.values()
        )
        offsets: dict[tuple[str, int], int] = {}
        for name, model in models.items():
            for tensor in _external(model):
                if apart:
                    self._move(tensor, offsets)
                else:
                    external_data_helper.load_external_data_for_tensor(tensor, str(self._source))
                    tensor.data_location = TensorProto.DEFAULT
                    del tensor.external_data[:]
            onnx.save_model(model, self._root / name)
            onnx.checker.check_model(str(self._root / name))

    def _move(self, tensor: TensorProto, offsets: dict[tuple[str, int], int]) -> None:
        """Append the data of ``tensor`` to the shared file, once, and point there."""
        info = external_data_helper.ExternalDataInfo(tensor)
        key = (info.location, info.offset or 0)
        length = info.length or 0
        if key not in offsets:
            with (self._source / info.location).open("rb") as stream:
                stream.seek(key[1])
                data = stream.read(length)
            with (self._root / FROZEN_WEIGHTS).open("ab") as stream:
                offsets[key] = stream.tell()
                stream.write(data)
        del tensor.external_data[:]
        for name, value in (("location", FROZEN_WEIGHTS), ("offset", offsets[key]), ("length", length)):
            tensor.external_data.add(key=name, value=str(value))


def _external(model: onnx.ModelProto) -> list[TensorProto]:
    return [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
