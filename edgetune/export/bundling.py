"""The whole way from a model to a bundle: capture, choose, fold, split, differentiate, emit, write.

Knows every room but engines, telemetry and the agent.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper

from edgetune.adapters.settings import AdapterSettings, parse
from edgetune.autodiff.builder import OPSET
from edgetune.autodiff.graph import ForwardGraph
from edgetune.autodiff.losses import Loss, LossConfig, loss_from
from edgetune.autodiff.rules.conv import with_form
from edgetune.bundle import (
    FORMAT_VERSION,
    MANIFEST,
    TRACED,
    Bundle,
    LossSpec,
    Manifest,
    OptimizerSpec,
    ParameterSpec,
    PreprocessSpec,
    TensorSpec,
    write_manifest,
)
from edgetune.codecs import label_of, menu_from, with_fallback
from edgetune.errors import ExportError, UsageError, choices
from edgetune.export.adapting import adapt
from edgetune.export.canonical import canonicalise, fold_frozen
from edgetune.export.capture import Captured, capture
from edgetune.export.emit import WeightFile, belongs_in_file
from edgetune.export.inference import write_inference
from edgetune.export.normalisation import settle_batch_norm
from edgetune.export.optimizers import optimizer_named
from edgetune.export.pieces import pieces_of_loss
from edgetune.export.selection import Selection, choose_trained, replace_head
from edgetune.export.source import Signature, load_factory, load_source
from edgetune.export.split import split_graph
from edgetune.export.writer import TARGETS, GraphWriter
from edgetune.version import __version__

BATCH_NORMS = ("frozen", "trained")
CONVOLUTIONS = ("products", "direct")
"""How train graphs write convolutions: as matrix products where those are faster on a CPU, or as the operator Conv."""
COMPRESS = ("layers", "all")
"""What codecs are used for. ``layers``: the inputs of trained layers, whose error stays in one weight gradient, and of
trained batch-norm. ``all``: besides, every tensor whose values the backward pass needs (smooth nonlinearities,
attention, normalisations); that error travels on to earlier layers."""


@dataclass(frozen=True)
class ExportOptions:
    """What a user may choose; see ``edgetune export --help``.

    ``adapter`` is a spelling that ``adapters.parse`` reads; None for none.

    ``loss`` is the name of a loss, a source as text (``file.py:factory``), or a torch module
    ``(outputs, targets) -> scalar``; ``target`` tells the shape of the targets of the latter two. ``train``, where it
    is given, replaces ``last``. ``codec`` is one, or a menu (``hosvd+dct+int8``) from which a plan chooses for every
    tensor; ``compress`` as in :data:`COMPRESS`.
    """

    last: int | str = 4
    train: str | None = None
    codec: str = "hosvd"
    compress: str = "layers"
    loss: Any = "cross_entropy"
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()
    ignore_index: int | None = None
    target: Signature | None = None
    outputs: tuple[str, ...] = ()
    optimizer: str = "sgd"
    batch_norm: str = "frozen"
    new_head: int | None = None
    freeze_head: bool = False
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    adapter: str | None = None
    convolutions: str = "products"

    @property
    def traces_loss(self) -> bool:
        """Whether the loss is the user's own."""
        return not isinstance(self.loss, str) or ":" in self.loss

    def loss_config(self) -> LossConfig:
        """Return the settings of a named loss."""
        return LossConfig(
            kind=self.loss,
            label_smoothing=self.label_smoothing,
            class_weights=self.class_weights,
            ignore_index=self.ignore_index,
        )

    def adapter_settings(self) -> AdapterSettings | None:
        """Return the settings of the adapter.

        Raises:
            UsageError: they cannot be read.
        """
        return None if self.adapter is None else parse(self.adapter)

    def check(self) -> None:
        """Raise UsageError if a choice is unknown or out of range."""
        menu_from(self.codec)
        if self.compress not in COMPRESS:
            raise UsageError(f"what is compressed, '{self.compress}', is unknown; choose one of: {choices(COMPRESS)}")
        if self.convolutions not in CONVOLUTIONS:
            raise UsageError(
                f"convolutions as '{self.convolutions}' are unknown; choose one of: {choices(CONVOLUTIONS)}"
            )
        optimizer_named(self.optimizer)
        self.adapter_settings()
        if self.batch_norm not in BATCH_NORMS:
            raise UsageError(f"batch-norm '{self.batch_norm}' is unknown; choose one of: {choices(BATCH_NORMS)}")
        if not self.traces_loss:
            loss_from(self.loss_config())
        elif self.label_smoothing or self.class_weights or self.ignore_index is not None:
            raise UsageError("label smoothing, class weights and ignore_index are settings of the named losses")


def export_bundle(source: Any, output: str | Path, options: ExportOptions, inputs: Sequence[Signature] = ()) -> Bundle:
    """Write the bundle of ``source`` to the directory ``output`` and open it.

    Args:
        source: an ``nn.Module``, an exported program, an ONNX model, one that is ``Captured`` already, or a source as
            text (``source.load_source``).
        inputs: the shape of one sample of every input; needed for torch modules.

    Raises:
        UsageError, ExportError, UnsupportedOperatorError: see the message; nothing is left behind in ``output``.
    """
    options.check()
    target = Path(output)
    if target.exists():
        _check_replaceable(target)
    name = source if isinstance(source, str) else type(source).__name__
    model = load_source(source) if isinstance(source, str) else source
    loss = options.loss
    if options.traces_loss:
        loss = load_factory(loss)() if isinstance(loss, str) else loss
    traced = loss if options.traces_loss else None
    captured = model
    if not isinstance(captured, Captured):
        captured = capture(model, inputs, outputs=options.outputs, loss=traced, target=options.target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as scratch:
        root = Path(scratch) / "bundle"
        root.mkdir()
        write_manifest(root, _write_all(root, captured, options, name))
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


def _write_all(root: Path, captured: Captured, options: ExportOptions, name: str) -> Manifest:
    graph = canonicalise(captured)
    if options.new_head is not None:
        replace_head(graph, options.new_head)
    train_norms = options.batch_norm == "trained"
    selection = choose_trained(
        graph, options.last, options.train, freeze_head=options.freeze_head, train_norms=train_norms
    )
    _refuse_other_floats(graph, selection)
    _check_outputs(graph)
    fold_frozen(graph, selection.parameters)
    buffers = settle_batch_norm(
        graph, {layer.node for layer in selection.layers}, selection.parameters, batch_statistics=train_norms
    )
    settings = options.adapter_settings()
    selection, adapter = (selection, None) if settings is None else adapt(graph, selection, settings)
    loss = None if options.traces_loss else loss_from(options.loss_config())
    targets = _targets(graph, loss)
    split = split_graph(graph, selection.parameters)
    if options.convolutions == "products":
        split.tail.nodes = [with_form(split.tail, node) for node in split.tail.nodes]
    values = {p: split.tail.constants.pop(p) for p in selection.parameters}
    state = {b: split.tail.constants.pop(b) for b in buffers}
    weights = WeightFile()
    weights.add(values | state)
    trunk_reads = {i for node in split.trunk_nodes for i in node.inputs}
    fixed = {k: v for k, v in graph.constants.items() if k in trunk_reads or k in split.tail.constants}
    own = adapter.fixed if adapter else frozenset()
    kept = {k: v for k, v in fixed.items() if belongs_in_file(v) or k in own}
    weights.add({k: v for k, v in kept.items() if k not in values and k not in state})
    weights.write(root)

    menu = with_fallback(menu_from(options.codec))
    pieces = "" if buffers else _pieces(graph, options)
    writer = GraphWriter(
        root, graph, split, weights, selection, {p: v.shape for p, v in values.items()},
        {b: v.shape for b, v in state.items()}, targets, loss, menu, menu if options.compress == "all" else (),
        options.optimizer, pieces,
    )  # fmt: skip
    graphs, saved = writer.write()
    inference = write_inference(root, graph, weights, [*values, *state])
    optimizer = optimizer_named(options.optimizer)
    inputs = tuple(_spec(graph, n) for n in graph.inputs if n not in graph.targets)
    pairs = zip(graph.output_names, graph.outputs, strict=True)
    outputs = tuple(dataclasses.replace(_spec(graph, tensor), name=public) for public, tensor in pairs)
    return Manifest(
        format_version=FORMAT_VERSION,
        model=name,
        made_by=f"edgetune {__version__} ({captured.method})",
        opset=OPSET,
        inputs=inputs,
        features=tuple(_spec(graph, n) for n in split.features),
        outputs=outputs,
        targets=targets,
        classes=_classes(outputs[0], options),
        preprocess=_preprocess(inputs[0].shape, options),
        loss=LossSpec(TRACED, pieces=pieces)
        if loss is None
        else LossSpec(options.loss, _settings(options.loss_config()), pieces),
        optimizer=OptimizerSpec(options.optimizer, optimizer.slots, dict(optimizer.scalars)),
        codec="+".join(label_of(codec) for codec in menu),
        layers=tuple(writer.layer_specs()),
        saved=tuple(saved),
        parameters=_parameter_specs(selection, {p: v.shape for p, v in values.items()}),
        graphs=graphs,
        inference=inference,
        buffers=tuple(TensorSpec(b, v.shape) for b, v in state.items()),
        adapter=adapter,
    )


def _pieces(graph: ForwardGraph, options: ExportOptions) -> str:
    """Return how the losses of the pieces of a batch make that of the whole, as ``LossSpec.pieces``."""
    if options.traces_loss:
        return pieces_of_loss(graph)
    # Smoothed labels leave a cost where the weights of a piece sum to nothing, which no mean over the piece can tell.
    return "" if options.label_smoothing and 0.0 in options.class_weights else "mean"


def _refuse_other_floats(graph: ForwardGraph, selection: Selection) -> None:
    for name in selection.parameters:
        kind = graph.constants[name].dtype
        if kind != np.float32:
            raise ExportError(
                f"'{name}' is {kind}; what is trained must be float32: convert the model first (.float())"
            )


def _check_outputs(graph: ForwardGraph) -> None:
    for public, tensor in zip(graph.output_names, graph.outputs, strict=True):
        shape = graph.shapes[tensor]
        if not shape or shape[0] != 0 or any(extent <= 0 for extent in shape[1:]):
            raise ExportError(f"the output '{public}' has the shape {shape}; expected [batch, ...]")


def _spec(graph: ForwardGraph, name: str) -> TensorSpec:
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(graph.dtypes[name]))
    return TensorSpec(name, graph.sample_shape(name), str(dtype))


def _targets(graph: ForwardGraph, loss: Loss | None) -> TensorSpec:
    if loss is None:
        return dataclasses.replace(_spec(graph, graph.targets[0]), name=TARGETS)
    shape, dtype = loss.target(graph.sample_shape(graph.outputs[0]))
    return TensorSpec(TARGETS, shape, dtype)


def _settings(config: LossConfig) -> dict[str, Any]:
    """Return the settings of a loss that differ from their defaults."""
    named = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name != "kind"}
    default = LossConfig(config.kind)
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in named.items()
        if value != getattr(default, key)
    }


def _classes(output: TensorSpec, options: ExportOptions) -> tuple[str, ...]:
    """Return the names of the classes: given, or their numbers; none where the targets are no classes."""
    if options.loss != "cross_entropy":
        if options.classes:
            raise UsageError("class names go with --loss cross_entropy")
        return ()
    count = output.shape[0]
    classes = options.classes or tuple(str(i) for i in range(count))
    if len(classes) != count:
        raise UsageError(f"{len(classes)} class names were given for a model with {count} outputs")
    return classes


def _parameter_specs(selection: Selection, shapes: dict[str, tuple[int, ...]]) -> tuple[ParameterSpec, ...]:
    owners = {tensor: layer.name for layer in reversed(selection.layers) for tensor in layer.tensors}
    head = set(selection.head.tensors) if selection.head else set()
    return tuple(
        ParameterSpec(name, tuple(shape), owners.get(name, name.rpartition(".")[0]), "head" if name in head else "tail")
        for name, shape in shapes.items()
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
