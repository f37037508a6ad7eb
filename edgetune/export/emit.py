"""Emitted nodes -> ONNX files whose weights live in weights.safetensors, and what the manifest says of them.

Knows onnx, safetensors' file layout and the bundle.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, inliner, numpy_helper
from safetensors.numpy import save_file

from edgetune.autodiff.builder import DOMAIN, IR_VERSION, OPSET, FunctionLibrary, GraphBuilder
from edgetune.autodiff.reverse import CHOOSE
from edgetune.bundle import WEIGHTS, Array, ChoiceSpec, GraphSpec, StageSpec
from edgetune.errors import ExportError
from edgetune.export.symbolic import element_types, reads, symbolic_shapes, wires_of, workspaces
from edgetune.planning.lifetimes import boundary_of, lifetimes

_INLINE_BYTES = 256  # smaller constants are part of the graph: shapes, axes, bit masks


@dataclass(frozen=True)
class Value:
    """A graph input or output: each extent an integer or the name of a symbol. ``kind`` as in ``TensorUse.kind``.

    ``count`` is the symbol for what an input holds, where that is a number of elements.
    """

    name: str
    shape: tuple[int | str, ...]
    kind: str
    dtype: int = TensorProto.FLOAT
    count: str = ""

    def info(self) -> onnx.ValueInfoProto:
        """Return the value as ONNX describes it."""
        return helper.make_tensor_value_info(self.name, self.dtype, list(self.shape))


class WeightFile:
    """The one file with all weights. Graphs point into it as ONNX external data, so no weight is stored twice."""

    def __init__(self) -> None:
        self._tensors: dict[str, Array] = {}
        self._offsets: dict[str, tuple[int, int]] = {}

    def add(self, tensors: Mapping[str, Array]) -> None:
        """Add tensors by name.

        Raises:
            ExportError: another tensor of that name is there already.
        """
        for name, value in tensors.items():
            known = self._tensors.setdefault(name, value)
            if known is not value and not np.array_equal(known, value):
                raise ExportError(f"two tensors are called '{name}'; rename one in the model")

    def write(self, root: Path) -> None:
        """Write the file and learn where each tensor lies in it."""
        path = root / WEIGHTS
        save_file({name: np.asarray(value, order="C") for name, value in self._tensors.items()}, path)
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                self._offsets[name] = (8 + length + begin, end - begin)

    def initializer(self, name: str, value: Array) -> onnx.TensorProto:
        """Return the constant ``name``: a pointer into the file, or the value itself if it is small."""
        if name not in self._offsets:
            # not ascontiguousarray, which gives a scalar an axis
            return numpy_helper.from_array(np.asarray(value, order="C"), name)
        offset, length = self._offsets[name]
        tensor = TensorProto(name=name, dims=value.shape, data_location=TensorProto.EXTERNAL)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(value.dtype)
        for key, entry in (("location", WEIGHTS), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=entry)
        return tensor


def belongs_in_file(value: Array) -> bool:
    """Tell whether a constant is a weight (kept in the file) rather than a small number (kept in the graph)."""
    return value.nbytes > _INLINE_BYTES


def rename_outputs(nodes: Sequence[onnx.NodeProto], wanted: Mapping[str, str]) -> list[onnx.NodeProto]:
    """Return ``nodes`` with outputs renamed; ``wanted`` maps the final name to the emitted one.

    Where one emitted tensor is wanted under two names, the second becomes a copy.
    """
    first: dict[str, str] = {}
    copies: list[onnx.NodeProto] = []
    for final, emitted in wanted.items():
        if emitted in first:
            copies.append(helper.make_node("Identity", [first[emitted]], [final], name=final))
        else:
            first[emitted] = final
    renamed = []
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [first.get(name, name) for name in node.input]
        copy.output[:] = [first.get(name, name) for name in node.output]
        renamed.append(copy)
    return renamed + copies


def write_graph(
    root: Path,
    name: str,
    g: GraphBuilder,
    library: FunctionLibrary | None,
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    emitted: Mapping[str, str],
    constants: Mapping[str, Array],
    weights: WeightFile,
    saved: Sequence[str] = (),
    forward_ends: Sequence[str] = (),
    in_place: Mapping[str, str] | None = None,
) -> GraphSpec:
    """Write ``<name>.onnx`` (and ``<name>.flat.onnx`` where it calls functions) and return its entry in the manifest.

    Args:
        emitted: per output, the name under which it was emitted.
        saved: emitted names of the tensors kept for the backward pass.
        forward_ends: emitted names of the tensors that end the forward pass; the graph is then also written in two
            stages, unless the backward pass reads a feature.
        in_place: as ``GraphSpec.in_place``.
    """
    nodes = rename_outputs(g.nodes, emitted)
    read = {key for node in nodes for key in reads(node)}
    everything = {**constants, **g.constants}
    initializers = [weights.initializer(key, value) for key, value in everything.items() if key in read]
    used = [value for value in inputs if value.name in read]
    graph = helper.make_graph(nodes, name, [v.info() for v in used], [v.info() for v in outputs], initializers)
    functions = list(library.functions.values()) if library else []
    file = f"{name}.onnx"
    model = save_checked(root / file, graph, functions)
    flat, flat_file = model, file
    if functions:
        flat = _flatten(model)
        flat_file = f"{name}.flat.onnx"
        onnx.save_model(flat, root / flat_file)
    kinds = {v.name: v.kind for v in [*used, *outputs]}
    back = {old: new for new, old in emitted.items()}
    kinds |= {back.get(tensor, tensor): "saved" for tensor in saved if back.get(tensor, tensor) not in kinds}
    counts = {v.name: v.count for v in used if v.count}
    shapes, dtypes = symbolic_shapes(flat, counts), element_types(flat)
    wires, ends = wires_of(flat), {back.get(tensor, tensor) for tensor in forward_ends}
    choices = _choices(flat)
    boundary = None if choices else boundary_of(wires, ends, {v.name for v in used if v.kind == "feature"})
    stages = _write_stages(root, name, flat, boundary, shapes, dtypes) if boundary else ()
    resident = [*(i.name for i in flat.graph.input), *(t.name for t in flat.graph.initializer)]
    made = [o.name for o in flat.graph.output]
    return GraphSpec(
        file=file,
        flat_file=flat_file,
        inputs=tuple(v.name for v in used),
        outputs=tuple(v.name for v in outputs),
        nodes=tuple(node.name for node in flat.graph.node),
        tensors=lifetimes(wires, resident, made, kinds, shapes, dtypes, boundary, in_place),
        workspaces=tuple(workspaces(flat.graph.node, shapes)),
        stages=stages,
        in_place=dict(in_place or {}),
        wires=wires if choices or in_place or forward_ends else (),
        choices=choices,
        ends=tuple(sorted(ends)),
    )


def _choices(flat: onnx.ModelProto) -> tuple[ChoiceSpec, ...]:
    """Return the places where a plan chooses."""
    found = []
    for node in flat.graph.node:
        if node.op_type == CHOOSE:
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            labels = [label.decode() for label in attributes["options"]]
            options = dict(zip(labels, node.input, strict=True))
            found.append(ChoiceSpec(attributes["saved"].decode(), node.output[0], options))
    return tuple(found)


def save_checked(path: Path, graph: onnx.GraphProto, functions: Sequence[onnx.FunctionProto] = ()) -> onnx.ModelProto:
    """Write ``graph`` as a model of this project's opset, have onnx check it, and return it."""
    opsets = [helper.make_opsetid("", OPSET)] + ([helper.make_opsetid(DOMAIN, 1)] if functions else [])
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=IR_VERSION, functions=list(functions), producer_name="edgetune"
    )
    onnx.save_model(model, path)
    onnx.checker.check_model(str(path))
    return model


def _write_stages(
    root: Path,
    name: str,
    flat: onnx.ModelProto,
    boundary: int,
    shapes: Mapping[str, tuple[str, ...]],
    dtypes: Mapping[str, str],
) -> tuple[StageSpec, ...]:
    """Write the two halves of ``flat`` as ``<name>.forward.onnx`` and ``<name>.backward.onnx``."""
    nodes = list(flat.graph.node)
    inputs = {v.name: v for v in flat.graph.input}
    outputs = {v.name: v for v in flat.graph.output}
    known = {tensor.name: tensor for tensor in flat.graph.initializer}
    halves = {"forward": nodes[:boundary], "backward": nodes[boundary:]}
    made_first = {key for node in halves["forward"] for key in node.output}
    read_second = {key: None for node in halves["backward"] for key in reads(node)}
    crossing = {key: _typed(key, shapes[key], dtypes[key]) for key in read_second if key in made_first}
    stages = []
    for half, part in halves.items():
        read = {key for node in part for key in reads(node)}
        own = {key for node in part for key in node.output}
        taken = [v for key, v in inputs.items() if key in read] + (
            list(crossing.values()) if half == "backward" else []
        )
        given = [v for key, v in outputs.items() if key in own]
        if half == "forward":
            given += [v for key, v in crossing.items() if key not in outputs]
        constants = [tensor for key, tensor in known.items() if key in read]
        graph = helper.make_graph(part, f"{name}_{half}", taken, given, constants)
        file = f"{name}.{half}.onnx"
        save_checked(root / file, graph)
        end = boundary if half == "forward" else len(nodes)
        stages.append(StageSpec(file, tuple(v.name for v in taken), tuple(v.name for v in given), end))
    return tuple(stages)


def _typed(name: str, shape: Sequence[str], dtype: str) -> onnx.ValueInfoProto:
    extents = [int(extent) if extent.isdigit() else extent for extent in shape]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), extents)


def _flatten(model: onnx.ModelProto) -> onnx.ModelProto:
    """Inline every function, turn Constant nodes into shared initializers, and give every node a name of its own."""
    flat = inliner.inline_local_functions(model)
    known: dict[bytes, str] = {}
    renamed: dict[str, str] = {}
    nodes = []
    for node in flat.graph.node:
        if node.op_type == "Constant":
            tensor = TensorProto()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = ""
            key = tensor.SerializeToString(deterministic=True)
            if key not in known:
                known[key] = node.output[0]
                tensor.name = node.output[0]
                flat.graph.initializer.append(tensor)
            renamed[node.output[0]] = known[key]
        else:
            nodes.append(node)
    for index, node in enumerate(nodes):
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.name = f"{index}:{node.output[0]}"
        for attribute in node.attribute:
            for inner in attribute.g.node if attribute.type == onnx.AttributeProto.GRAPH else ():
                inner.input[:] = [renamed.get(name, name) for name in inner.input]
    rest = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del flat.graph.node[:]
    flat.graph.node.extend(rest)
    del flat.graph.value_info[:]
    del flat.opset_import[:]  # the inliner keeps the functions' domain, which nothing uses any more
    flat.opset_import.append(helper.make_opsetid("", OPSET))
    return flat
