"""The whole way from a model to a bundle: capture, choose, fold, split, differentiate, emit, write.

Knows every room but engines, telemetry and the agent.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import TensorProto

from edgetune.autodiff.builder import OPSET, FunctionLibrary, GraphBuilder
from edgetune.autodiff.calibrate import emit_grams
from edgetune.autodiff.graph import BATCH, ForwardGraph
from edgetune.autodiff.loss import loss_named
from edgetune.autodiff.lowering import emit_node
from edgetune.autodiff.reverse import Slot, TrainedLayer, emit_gradients
from edgetune.bundle import (
    FORMAT_VERSION,
    MANIFEST,
    Bundle,
    GraphSpec,
    LayerSpec,
    LossSpec,
    Manifest,
    ModeSpec,
    OptimizerSpec,
    ParameterSpec,
    PreprocessSpec,
    SavedSpec,
    TensorSpec,
    write_manifest,
)
from edgetune.codecs import Dense, codec_named
from edgetune.errors import ExportError, UsageError
from edgetune.export.canonical import canonicalise, fold_batch_norm
from edgetune.export.capture import capture, load_source
from edgetune.export.emit import Value, WeightFile, belongs_in_file, write_graph
from edgetune.export.optimizers import emit_update, optimizer_named
from edgetune.export.split import Split, WeightLayer, choose_trained, replace_head, split_graph
from edgetune.version import __version__

TARGETS = "targets"


@dataclass(frozen=True)
class ExportOptions:
    """What a user may choose; see ``edgetune export --help``."""

    last: int = 4
    codec: str = "hosvd"
    loss: str = "cross_entropy"
    label_smoothing: float = 0.0
    optimizer: str = "sgd"
    new_head: int | None = None
    freeze_head: bool = False
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def check(self) -> None:
        """Raise UsageError if a choice is unknown or out of range."""
        codec_named(self.codec)
        loss_named(self.loss)
        optimizer_named(self.optimizer)
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UsageError(f"label smoothing {self.label_smoothing} is out of range: expected 0 <= value < 1")


def export_bundle(
    source: Any, output: str | Path, options: ExportOptions, input_shape: Sequence[int] | None = None
) -> Bundle:
    """Write the bundle of ``source`` to the directory ``output`` and open it.

    Args:
        source: an ``nn.Module``, an ONNX model, or a source as text (see ``capture.load_source``).
        input_shape: shape of one sample; needed for torch modules.

    Raises:
        UsageError, ExportError, UnsupportedOperatorError: see the message; nothing is left behind in ``output``.
    """
    options.check()
    target = Path(output)
    if target.exists():
        _check_replaceable(target)
    name = source if isinstance(source, str) else type(source).__name__
    model = load_source(source) if isinstance(source, str) else source
    graph = canonicalise(capture(model, input_shape))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as scratch:
        root = Path(scratch) / "bundle"
        root.mkdir()
        write_manifest(root, _write_all(root, graph, options, name))
        if target.exists():
            target.rename(Path(scratch) / "old")  # goes with the scratch directory, once the new one is in its place
        root.rename(target)
    return Bundle.open(target)


def _check_replaceable(target: Path) -> None:
    """Raise UsageError unless ``target`` is an empty directory, or a bundle and nothing else."""
    if not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST).is_file()):
        raise UsageError(f"'{target}' exists and is not a bundle; choose another place for the output")
    if any(target.iterdir()):
        own = {MANIFEST, *Bundle.open(target, verify=False).manifest.files}
        foreign = sorted(path.name for path in target.iterdir() if path.name not in own)
        if foreign:
            raise UsageError(f"'{target}' holds more than a bundle ({', '.join(foreign[:5])}); choose another place")


def _write_all(root: Path, graph: ForwardGraph, options: ExportOptions, name: str) -> Manifest:
    if options.new_head is not None:
        replace_head(graph, options.new_head)
    body, head = choose_trained(graph, options.last)
    trained = [*body, *([] if options.freeze_head else [head])]
    if not trained:
        raise UsageError("nothing is trained: --last 0 with a frozen head")
    fold_batch_norm(graph, {layer.node for layer in trained})
    parameters = list(dict.fromkeys(p for layer in trained for p in (layer.weight, layer.bias) if p))
    split = split_graph(graph, set(parameters))
    values = {p: split.tail.constants.pop(p) for p in parameters}
    weights = WeightFile()
    weights.add(values)
    trunk_reads = {i for node in split.trunk_nodes for i in node.inputs}
    fixed = {k: v for k, v in graph.constants.items() if k in trunk_reads or k in split.tail.constants}
    weights.add({k: v for k, v in fixed.items() if belongs_in_file(v) and k not in values})
    weights.write(root)

    writer = _Writer(root, graph, split, options, weights, {p: v.shape for p, v in values.items()}, trained, head)
    graphs, saved = writer.write()
    logits_shape = graph.sample_shape(graph.output)
    if len(logits_shape) != 1:
        raise ExportError(
            f"the model's output has the shape [batch, {logits_shape}]; cross-entropy needs [batch, classes]"
        )
    classes = options.classes or tuple(str(i) for i in range(logits_shape[0]))
    if len(classes) != logits_shape[0]:
        raise UsageError(f"{len(classes)} class names were given for a model with {logits_shape[0]} outputs")
    optimizer = optimizer_named(options.optimizer)
    roles = {p: ("head" if layer is head else "tail") for layer in trained for p in (layer.weight, layer.bias) if p}
    owners = {p: layer.name for layer in reversed(trained) for p in (layer.weight, layer.bias) if p}
    return Manifest(
        format_version=FORMAT_VERSION,
        model=name,
        made_by=f"edgetune {__version__}",
        opset=OPSET,
        inputs=tuple(TensorSpec(n, graph.sample_shape(n)) for n in graph.inputs),
        features=tuple(TensorSpec(n, graph.sample_shape(n)) for n in split.features),
        logits=TensorSpec("logits", logits_shape),
        classes=classes,
        preprocess=_preprocess(graph.sample_shape(graph.inputs[0]), options),
        loss=LossSpec(options.loss, options.label_smoothing),
        optimizer=OptimizerSpec(options.optimizer, optimizer.slots, dict(optimizer.scalars)),
        codec=options.codec,
        layers=tuple(writer.layer_specs()),
        saved=tuple(saved),
        parameters=tuple(ParameterSpec(p, tuple(v.shape), owners[p], roles[p]) for p, v in values.items()),
        graphs=graphs,
    )


def _preprocess(shape: tuple[int, ...], options: ExportOptions) -> PreprocessSpec:
    color = {1: "L", 3: "RGB"}.get(shape[0], "none") if len(shape) == 3 else "none"
    channels = shape[0] if shape else 1
    mean, std = options.mean or (0.0,) * channels, options.std or (1.0,) * channels
    if color != "none" and not len(mean) == len(std) == channels:
        raise UsageError(f"--mean and --std need {channels} values each, one per channel")
    if any(value <= 0 for value in std):
        raise UsageError("--std needs positive values")
    return PreprocessSpec(color, tuple(mean), tuple(std))


class _Writer:
    """Emits and writes the graphs of one bundle."""

    def __init__(
        self,
        root: Path,
        graph: ForwardGraph,
        split: Split,
        options: ExportOptions,
        weights: WeightFile,
        parameters: dict[str, tuple[int, ...]],
        trained: list[WeightLayer],
        head: WeightLayer,
    ) -> None:
        self.root, self.graph, self.split, self.options, self.weights = root, graph, split, options, weights
        self.parameters, self.trained, self.head = parameters, trained, head
        self.inputs = [Value(n, (BATCH, *graph.sample_shape(n)), "feature") for n in split.features]
        self.parameter_values = [Value(p, shape, "parameter") for p, shape in parameters.items()]
        self.slots: list[Slot] = []

    def write(self) -> tuple[dict[str, GraphSpec], list[SavedSpec]]:
        graphs = {}
        if self.split.trunk_nodes:
            graphs["trunk"] = self._trunk()
        graphs["train"], saved = self._train()
        if any(slot.codec.lossy for slot in self.slots):
            graphs["calibrate"] = self._calibrate()
        graphs["predict"] = self._predict()
        graphs["update"] = self._update()
        return graphs, saved

    def layer_specs(self) -> list[LayerSpec]:
        nodes = {node.name: node for node in self.split.tail.nodes}
        slot_of = {layer: slot.saved.name for slot in self.slots for layer in slot.layers}
        return [
            LayerSpec(
                layer.name,
                layer.op,
                "head" if layer is self.head else "tail",
                self.graph.sample_shape(nodes[layer.node].inputs[0]),
                layer.weight,
                layer.bias,
                slot_of[layer.name],
            )
            for layer in self.trained
        ]

    def _trunk(self) -> GraphSpec:
        g = GraphBuilder(taken=set(self.graph.shapes))
        for node in self.split.trunk_nodes:
            emit_node(g, node)
        inputs = [Value(n, (BATCH, *self.graph.sample_shape(n)), "input") for n in self.graph.inputs]
        made = {name for node in self.split.trunk_nodes for name in node.outputs}
        # A feature that is the model's own input does not pass through the trunk.
        outputs = [dataclasses.replace(v, kind="feature") for v in self.inputs if v.name in made]
        return self._write("trunk", g, None, inputs, outputs, {v.name: v.name for v in outputs}, self.graph)

    def _train(self) -> tuple[GraphSpec, list[SavedSpec]]:
        g, library, tail = GraphBuilder(taken=set(self.graph.shapes)), FunctionLibrary(), self.split.tail
        lossy = codec_named(self.options.codec)
        layers = {
            layer.node: TrainedLayer(layer.name, Dense() if layer is self.head else lossy) for layer in self.trained
        }
        made = emit_gradients(
            g, library, tail, layers, list(self.parameters), TARGETS, self.options.loss, self.options.label_smoothing
        )
        self.slots = made.slots
        bases = [Value(m.input, _basis_shape(m), "basis") for s in made.slots for m in _modes(s)]
        targets = Value(TARGETS, (BATCH,), "target", TensorProto.INT64)
        emitted = {"loss": made.loss, "correct": made.correct}
        emitted |= {f"gradient/{p}": name for p, name in made.parameters.items()}
        outputs = [Value("loss", (), "output"), Value("correct", (), "output")]
        outputs += [Value(f"gradient/{p}", shape, "gradient") for p, shape in self.parameters.items()]
        for slot in made.slots:
            if slot.encoded is not None and slot.encoded.energy is not None:
                emitted[f"energy/{slot.saved.name}"] = slot.encoded.energy
                outputs.append(Value(f"energy/{slot.saved.name}", (), "output"))
        inputs = [*self.inputs, targets, *self.parameter_values, *bases]
        spec = self._write("train", g, library, inputs, outputs, emitted, tail, made.kept, made.forward_ends)
        return spec, [_saved_spec(slot) for slot in made.slots]

    def _calibrate(self) -> GraphSpec:
        g, tail = GraphBuilder(taken=set(self.graph.shapes)), self.split.tail
        grams = emit_grams(g, tail, [slot for slot in self.slots if slot.codec.lossy])
        outputs = []
        for slot in self.slots:
            for mode in _modes(slot):
                extent: int | str = BATCH if mode.size is None else mode.size
                outputs.append(Value(f"gram/{slot.saved.name}/{mode.letter}", (mode.groups, extent, extent), "output"))
        return self._write("calibrate", g, None, [*self.inputs, *self.parameter_values], outputs, grams, tail)

    def _predict(self) -> GraphSpec:
        g, tail = GraphBuilder(taken=set(self.graph.shapes)), self.split.tail
        for node in tail.nodes:
            emit_node(g, node)
        outputs = [Value("logits", (BATCH, *self.graph.sample_shape(self.graph.output)), "output")]
        emitted = {"logits": self.graph.output}
        return self._write("predict", g, None, [*self.inputs, *self.parameter_values], outputs, emitted, tail)

    def _update(self) -> GraphSpec:
        optimizer = optimizer_named(self.options.optimizer)
        slots = [(f"{slot}/{p}", shape) for p, shape in self.parameters.items() for slot in optimizer.slots]
        inputs = [
            *self.parameter_values,
            *(Value(f"gradient/{p}", shape, "gradient") for p, shape in self.parameters.items()),
            *(Value(name, shape, "state") for name, shape in slots),
            *(Value(name, (), "scalar") for name in optimizer.scalars),
        ]
        g = GraphBuilder(taken={value.name for value in inputs})
        emitted, in_place = emit_update(g, self.options.optimizer, list(self.parameters))
        kinds = {value.name: value for value in inputs}
        outputs = [dataclasses.replace(kinds[old], name=new) for new, old in in_place.items()]
        outputs.append(Value("gradient_norm", (), "output"))
        return self._write("update", g, None, inputs, outputs, emitted, None, in_place=in_place)

    def _write(
        self,
        name: str,
        g: GraphBuilder,
        library: FunctionLibrary | None,
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        emitted: dict[str, str],
        graph: ForwardGraph | None,
        saved: Sequence[str] = (),
        forward_ends: Sequence[str] = (),
        in_place: Mapping[str, str] | None = None,
    ) -> GraphSpec:
        constants = {k: v for k, v in graph.constants.items() if k not in self.parameters} if graph else {}
        return write_graph(
            self.root,
            name,
            g,
            library,
            inputs,
            outputs,
            emitted,
            constants,
            self.weights,
            saved,
            forward_ends,
            in_place,
        )


def _modes(slot: Slot) -> list[ModeSpec]:
    """Return the truncated modes of a slot. ``c`` has one factor per group."""
    shape, groups = slot.saved.shape, slot.saved.groups
    extents = {"c": shape[0] // groups, **dict(zip("hw", shape[1:], strict=False))}
    return [
        ModeSpec(letter, extents.get(letter), groups if letter == "c" else 1, f"rank.{slot.saved.name}.{letter}", name)
        for letter, name in slot.bases
    ]


def _basis_shape(mode: ModeSpec) -> tuple[int | str, ...]:
    return (BATCH, mode.rank) if mode.size is None else (mode.groups, mode.size, mode.rank)


def _saved_spec(slot: Slot) -> SavedSpec:
    assert slot.encoded is not None
    energy = f"energy/{slot.saved.name}" if slot.encoded.energy else None
    return SavedSpec(
        slot.saved.name, slot.layers, slot.codec.name, {}, slot.saved.shape, slot.saved.groups, tuple(_modes(slot)),
        energy, slot.encoded.stored,
    )  # fmt: skip
