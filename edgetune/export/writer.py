"""Emits and writes the graphs of one bundle, and what the manifest says of them. Knows autodiff, codecs and files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from edgetune.autodiff.builder import FunctionLibrary, GraphBuilder
from edgetune.autodiff.calibrate import emit_grams, spectra_of
from edgetune.autodiff.graph import BATCH, ForwardGraph, Node, prune
from edgetune.autodiff.losses import Loss
from edgetune.autodiff.lowering import emit_node
from edgetune.autodiff.memory import Option, Slot, TrainedLayer
from edgetune.autodiff.reverse import emit_gradients
from edgetune.bundle import GraphSpec, LayerSpec, ModeSpec, OptionSpec, SavedSpec, TensorSpec
from edgetune.codecs import Codec, Dense, Mode, Source, count_grid, label_of
from edgetune.codecs.base import config_of
from edgetune.export.emit import Value, WeightFile, write_graph
from edgetune.export.optimizers import ACCUMULATED, KEEP, SHARE, emit_accumulation, emit_update, optimizer_named
from edgetune.export.selection import Selection
from edgetune.export.split import Split

TARGETS = "targets"


class GraphWriter:
    """Writes the graphs of one bundle.

    Args:
        parameters: names and shapes of the trained tensors; ``buffers`` of what a step changes besides.
        loss: what is emitted behind the first output; None where the loss is traced.
        menu: the codecs for the inputs of the trained layers; ``values`` those for all other tensors (none: kept as
            they are).
        pieces: as ``LossSpec.pieces``.
    """

    def __init__(
        self,
        root: Path,
        graph: ForwardGraph,
        split: Split,
        weights: WeightFile,
        selection: Selection,
        parameters: Mapping[str, tuple[int, ...]],
        buffers: Mapping[str, tuple[int, ...]],
        targets: TensorSpec,
        loss: Loss | None,
        menu: Sequence[Codec],
        values: Sequence[Codec],
        optimizer: str,
        pieces: str,
    ) -> None:
        self.root, self.graph, self.split, self.weights = root, graph, split, weights
        self.selection, self.parameters, self.buffers = selection, parameters, buffers
        self.targets, self.loss, self.optimizer = targets, loss, optimizer
        self.menu, self.values = tuple(menu), tuple(values)
        self.pieces = pieces
        self.inputs = [self._value(name, "feature") for name in split.features]
        self.parameter_values = [Value(p, shape, "parameter") for p, shape in parameters.items()]
        self.buffer_values = [Value(name, shape, "buffer") for name, shape in buffers.items()]
        self.slots: list[Slot] = []

    def _value(self, name: str, kind: str) -> Value:
        return Value(name, (BATCH, *self.graph.sample_shape(name)), kind, self.graph.dtypes[name])

    def write(self) -> tuple[dict[str, GraphSpec], list[SavedSpec]]:
        graphs = {}
        if self.split.trunk_nodes:
            graphs["trunk"] = self._trunk()
        graphs["train"], saved = self._train()
        if any(spectra_of(slot) for slot in self.slots):
            graphs["calibrate"] = self._calibrate()
        graphs["predict"] = self._predict()
        graphs["update"] = self._update()
        if self.pieces:
            graphs["accumulate"] = self._accumulate()
        return graphs, saved

    def layer_specs(self) -> list[LayerSpec]:
        nodes = {node.name: node for node in self.split.tail.nodes}
        slot_of = {layer: slot.saved.name for slot in self.slots for layer in slot.layers}
        return [
            LayerSpec(
                layer.name,
                layer.op,
                "head" if layer == self.selection.head else "tail",
                self._sample_of(nodes[layer.node].inputs[0]),
                layer.weight,
                layer.bias,
                slot_of[layer.name],
            )
            for layer in self.selection.layers
        ]

    def _sample_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of one sample of ``name``; all of it where it is made of parameters alone."""
        grows = any(extent <= 0 for extent in self.graph.shapes[name])
        return self.graph.per_sample(name) if grows else self.graph.shapes[name]

    def _trunk(self) -> GraphSpec:
        g = GraphBuilder(taken=set(self.graph.shapes))
        for node in self.split.trunk_nodes:
            emit_node(g, node, self.graph)
        inputs = [self._value(name, "input") for name in self.graph.inputs if name not in self.graph.targets]
        made = {name for node in self.split.trunk_nodes for name in node.outputs}
        # A feature that is the model's own input does not pass through the trunk.
        outputs = [dataclasses.replace(v, kind="feature") for v in self.inputs if v.name in made]
        return self._write("trunk", g, None, inputs, outputs, {v.name: v.name for v in outputs}, self.graph)

    def _train(self) -> tuple[GraphSpec, list[SavedSpec]]:
        g, library, tail = GraphBuilder(taken=set(self.graph.shapes)), FunctionLibrary(), self.split.tail
        head = self.selection.head
        layers = {
            layer.node: TrainedLayer(layer.name, (Dense(),) if layer == head else self.menu)
            for layer in self.selection.layers
        }
        made = emit_gradients(g, library, tail, layers, list(self.parameters), TARGETS, self.loss, self.values)
        self.slots = made.slots
        bases = [_run_time_input(s, mode, name) for s in made.slots for name, mode in s.inputs.items()]
        target_type = helper.np_dtype_to_tensor_dtype(np.dtype(self.targets.dtype))
        targets = Value(TARGETS, (BATCH, *self.targets.shape), "target", target_type)
        emitted = {"loss": made.loss} | ({} if made.correct is None else {"correct": made.correct})
        outputs = [Value(name, (), "output") for name in emitted]
        emitted |= {f"gradient/{p}": name for p, name in made.parameters.items()}
        outputs += [Value(f"gradient/{p}", shape, "gradient") for p, shape in self.parameters.items()]
        emitted |= {f"new/{name}": f"new/{name}" for name in self.buffers}
        outputs += [Value(f"new/{name}", shape, "output") for name, shape in self.buffers.items()]
        emitted |= {f"energy/{name}": energy for name, energy in made.energies.items()}
        outputs += [Value(f"energy/{name}", (), "output") for name in made.energies]
        shapes = {value.name: value.shape for value in bases}
        emitted |= {f"next/{name}": factor for name, factor in made.carried.items()}
        outputs += [Value(f"next/{name}", shapes[name], "output") for name in made.carried]
        inputs = [*self.inputs, targets, *self.parameter_values, *self.buffer_values, *bases]
        ends = [*made.forward_ends, *(f"new/{name}" for name in self.buffers)]
        spec = self._write("train", g, library, inputs, outputs, emitted, tail, made.kept, ends)
        return spec, [_saved_spec(slot, slot.saved.name in made.energies) for slot in made.slots]

    def _calibrate(self) -> GraphSpec:
        g, tail = GraphBuilder(taken=set(self.graph.shapes)), self.split.tail
        slots = [slot for slot in self.slots if spectra_of(slot)]
        needed = prune(tail.nodes, [slot.tensor for slot in slots])
        grams = emit_grams(g, dataclasses.replace(tail, nodes=needed), slots)
        outputs = []
        for slot in slots:
            for spectrum, mode in spectra_of(slot).items():
                outputs.append(Value(f"gram/{slot.saved.name}/{spectrum}", _spectrum_shape(mode), "output"))
        return self._write("calibrate", g, None, self._forward_inputs(), outputs, grams, tail)

    def _forward_inputs(self) -> list[Value]:
        return [*self.inputs, *self.parameter_values, *self.buffer_values]

    def _predict(self) -> GraphSpec:
        g, tail = GraphBuilder(taken=set(self.graph.shapes)), self.split.tail
        for node in prune(tail.nodes, tail.outputs):
            emit_node(g, in_evaluation(node), tail)
        # An output that no trained tensor reaches is a feature; a graph's output cannot be its input.
        features = set(self.split.features)
        emitted, outputs = {}, []
        for name, tensor in zip(tail.output_names, tail.outputs, strict=True):
            made = g.op("Identity", tensor, hint=f"{tensor}.copy") if tensor in features else tensor
            emitted[f"output/{name}"] = made
            outputs.append(dataclasses.replace(self._value(tensor, "output"), name=f"output/{name}"))
        return self._write("predict", g, None, self._forward_inputs(), outputs, emitted, tail)

    def _update(self) -> GraphSpec:
        optimizer = optimizer_named(self.optimizer)
        slots = [(f"{slot}/{p}", shape) for p, shape in self.parameters.items() for slot in optimizer.slots]
        inputs = [
            *self.parameter_values,
            *(Value(f"gradient/{p}", shape, "gradient") for p, shape in self.parameters.items()),
            *(Value(name, shape, "state") for name, shape in slots),
            *(Value(name, (), "scalar") for name in optimizer.scalars),
        ]
        g = GraphBuilder(taken={value.name for value in inputs})
        emitted, in_place = emit_update(g, self.optimizer, self.parameters)
        kinds = {value.name: value for value in inputs}
        outputs = [dataclasses.replace(kinds[old], name=new) for new, old in in_place.items()]
        outputs.append(Value("gradient_norm", (), "output"))
        return self._write("update", g, None, inputs, outputs, emitted, None, in_place=in_place)

    def _accumulate(self) -> GraphSpec:
        before = [Value(f"{ACCUMULATED}/{p}", shape, "gradient") for p, shape in self.parameters.items()]
        fresh = [Value(f"gradient/{p}", shape, "gradient") for p, shape in self.parameters.items()]
        inputs = [*before, *fresh, Value(KEEP, (), "scalar"), Value(SHARE, (), "scalar")]
        g = GraphBuilder(taken={value.name for value in inputs})
        emitted, in_place = emit_accumulation(g, self.parameters)
        kinds = {value.name: value for value in inputs}
        outputs = [dataclasses.replace(kinds[old], name=new) for new, old in in_place.items()]
        return self._write("accumulate", g, None, inputs, outputs, emitted, None, in_place=in_place)

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
        given = {*self.parameters, *self.buffers}
        constants = {k: v for k, v in graph.constants.items() if k not in given} if graph else {}
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


def _mode_spec(slot: Slot, mode: Mode, name: str) -> ModeSpec:
    rank = f"rank.{slot.saved.name}.{mode.letter}" if mode.ranked else ""
    return ModeSpec(mode.letter, mode.size, mode.groups, rank, name, mode.source.value, mode.spectrum)


def _run_time_input(slot: Slot, mode: Mode, name: str) -> Value:
    """Return the graph input that brings ``mode``; its shape as ``codecs.base.Source`` says."""
    rank = f"rank.{slot.saved.name}.{mode.letter}"
    size: int | str = BATCH if mode.size is None else mode.size
    if mode.source is Source.COUNT:
        return Value(name, (1,), "scalar", TensorProto.INT64, rank)
    if mode.source is Source.NOISE:
        return Value(name, (size,), "basis")
    return Value(name, (mode.groups, size, rank) if mode.source is Source.BASIS else (size, rank), "basis")


def _spectrum_shape(mode: Mode) -> tuple[int | str, ...]:
    """Return the shape of what the calibrate graph tells of ``mode``: a Gram matrix per group, or energies by count."""
    if mode.source is Source.COUNT:
        assert mode.size is not None
        return (1, len(count_grid(mode.size)) + 1)
    size: int | str = BATCH if mode.size is None else mode.size
    return (mode.groups, size, size)


def _saved_spec(slot: Slot, certified: bool) -> SavedSpec:
    return SavedSpec(
        name=slot.saved.name,
        layers=slot.layers,
        options=tuple(_option_spec(slot, option) for option in slot.options),
        shape=slot.saved.shape,
        groups=slot.saved.groups,
        energy=f"energy/{slot.saved.name}" if certified else None,
        channels_last=slot.saved.channels_last,
    )


def _option_spec(slot: Slot, option: Option) -> OptionSpec:
    assert option.encoded is not None
    codec = option.codec
    modes = tuple(_mode_spec(slot, mode, name) for mode, name in option.inputs)
    return OptionSpec(label_of(codec), codec.name, config_of(codec), codec.lossy, modes, option.encoded.stored)


def in_evaluation(node: Node) -> Node:
    """Return ``node`` as it is in use rather than in training: batch-norm with its running statistics."""
    if node.op != "BatchNormalization" or not node.attributes.get("training_mode", 0):
        return node
    attributes = {key: value for key, value in node.attributes.items() if key != "training_mode"}
    return dataclasses.replace(node, outputs=node.outputs[:1], attributes=attributes)
