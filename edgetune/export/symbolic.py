"""The symbolic size of every tensor of an emitted graph. Knows onnx.

Sizes are found by arithmetic, not by algebra: every symbol (the batch, each rank) is set to a prime of its own that
divides no static extent, ONNX infers concrete shapes, and each extent is factored back into coefficient and symbols.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from edgetune.autodiff.reverse import CHOOSE
from edgetune.bundle import WireSpec, Workspace
from edgetune.errors import ExportError

_FIRST_PRIME = 1009


def _primes() -> Iterator[int]:
    candidate = _FIRST_PRIME
    while True:
        if all(candidate % d for d in range(3, int(candidate**0.5) + 1, 2)):
            yield candidate
        candidate += 2


def symbolic_shapes(model: onnx.ModelProto, counts: Mapping[str, str] | None = None) -> dict[str, tuple[str, ...]]:
    """Return the shape of every tensor of ``model``, whose inputs name their symbols as ``dim_param``.

    ``counts`` are inputs that hold a number of elements to keep, with the symbol of that number.

    Raises:
        ExportError: a shape cannot be inferred, or an extent is not a product of integers and symbols.
    """
    counts = counts or {}
    named = [d.dim_param for v in model.graph.input for d in v.type.tensor_type.shape.dim if d.HasField("dim_param")]
    symbols = dict.fromkeys([*named, *counts.values()])
    primes = _primes()
    first = _shapes_at(model, dict(zip(symbols, primes, strict=False)), counts)
    second = _shapes_at(model, dict(zip(symbols, primes, strict=False)), counts)
    # What is not a product of sizes and ranks leaves another coefficient at other primes.
    differ = [name for name, shape in first.items() if shape != second.get(name)]
    if differ:
        raise ExportError(
            f"an extent of '{differ[0]}' is not a product of sizes and ranks ({first[differ[0]]}); report this model "
            "as a defect"
        )
    missing = [o for n in model.graph.node for o in n.output if o and o not in first]
    if missing:
        raise ExportError(f"the size of '{missing[0]}' cannot be inferred; report this model as a defect")
    return first


def _shapes_at(
    model: onnx.ModelProto, values: Mapping[str, int], counts: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """Return the shapes that ONNX infers where every symbol has the prime ``values`` gives it, factored back."""
    probe = _inferable(model, {name: values[symbol] for name, symbol in counts.items()})
    for value in probe.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_value = values[dim.dim_param]
    for value in probe.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = shape_inference.infer_shapes(probe, strict_mode=True, data_prop=True)
    shapes: dict[str, tuple[str, ...]] = {}
    for value in [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]:
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            shapes[value.name] = tuple(_expression(d.dim_value, values) for d in dims)
    for tensor in model.graph.initializer:
        shapes[tensor.name] = tuple(str(d) for d in tensor.dims)
    return shapes


def _inferable(model: onnx.ModelProto, counts: Mapping[str, int]) -> onnx.ModelProto:
    """Return a copy of ``model`` that shape inference understands: a place of choice is its first option, and what is
    taken of the largest elements has the shape of as many elements of any kind."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.value_info[:]
    nodes: list[onnx.NodeProto] = []
    for node in probe.graph.node:
        if node.op_type == CHOOSE:
            nodes.append(helper.make_node("Identity", [next(filter(None, node.input))], list(node.output)))
        elif node.op_type == "TopK" and node.input[1] in counts:
            axis = next((a.i for a in node.attribute if a.name == "axis"), -1)
            taken, (values, indices) = f"{node.output[0]}/taken", node.output
            index = numpy_helper.from_array(np.zeros(counts[node.input[1]], np.int64), taken)
            probe.graph.initializer.append(index)
            nodes.append(helper.make_node("Gather", [node.input[0], taken], [values], axis=axis))
            nodes.append(helper.make_node("Cast", [values], [indices], to=TensorProto.INT64))
        else:
            nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del probe.graph.node[:]
    probe.graph.node.extend(nodes)
    return probe


def _expression(extent: int, values: Mapping[str, int]) -> str:
    factors = []
    for symbol, prime in values.items():
        while extent % prime == 0 and extent:
            extent //= prime
            factors.append(symbol)
    return "*".join([str(extent), *factors]) if extent != 1 or not factors else "*".join(factors)


def wires_of(model: onnx.ModelProto) -> tuple[WireSpec, ...]:
    """Return what every node of ``model`` reads and makes, in order."""
    return tuple(
        WireSpec(node.op_type, tuple(reads(node)), tuple(name for name in node.output if name))
        for node in model.graph.node
    )


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield every name that ``node`` reads, and those that its subgraphs read from around them."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            inside = attribute.g
            own = {v.name for v in inside.input} | {t.name for t in inside.initializer}
            own |= {name for inner in inside.node for name in inner.output}
            yield from (name for inner in inside.node for name in reads(inner) if name not in own)


def element_types(model: onnx.ModelProto) -> dict[str, str]:
    """Return the numpy name of the element type of every tensor."""
    inferred = shape_inference.infer_shapes(_inferable(model, {}), strict_mode=True)
    types = {t.name: t.data_type for t in inferred.graph.initializer}
    for value in [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]:
        types[value.name] = value.type.tensor_type.elem_type
    return {name: str(np.dtype(helper.tensor_dtype_to_np_dtype(kind))) for name, kind in types.items()}


def workspaces(nodes: Sequence[onnx.NodeProto], shapes: Mapping[str, tuple[str, ...]]) -> Iterator[Workspace]:
    """Yield the scratch memory of onnxruntime's CPU kernels, as measured (docs/memory.md).

    Conv: the columns of one image, but only where a group has more filters than an image has outputs; else they are
    made a stretch at a time. ConvTranspose: the columns of one image. Softmax along another axis than the last: input
    and output, transposed. Where: both selections. Einsum: its inputs, in the order of a matrix product.
    """
    for index, node in enumerate(nodes):
        attributes: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "ConvTranspose":
            # column buffer [c·k·l / group, y·x] of one image
            yield Workspace(index, "*".join([*shapes[node.input[1]][1:], *shapes[node.input[0]][2:]]))
        elif node.op_type == "Conv":
            weight, positions = shapes[node.input[1]], shapes[node.output[0]][2:]
            filters = int(weight[0]) // attributes.get("group", 1)
            if set(weight[2:]) != {"1"} and all(map(str.isdigit, positions)) and filters > _product(positions):
                yield Workspace(index, "*".join([*weight[1:], *positions]))
        elif node.op_type in ("Softmax", "LogSoftmax"):
            axis, rank = attributes.get("axis", -1), len(shapes[node.output[0]])
            if axis % rank != rank - 1:
                yield Workspace(index, "*".join(["2", *shapes[node.output[0]]]))
        elif node.op_type == "Where":
            yield Workspace(index, "*".join(["2", *shapes[node.output[0]]]))
        elif node.op_type == "Einsum":
            for name in node.input:
                yield Workspace(index, "*".join(shapes[name]) or "1")


def _product(extents: Sequence[str]) -> int:
    return math.prod(int(extent) for extent in extents)
