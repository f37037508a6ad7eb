"""The symbolic size and the lifetime of every tensor of an emitted graph. Knows onnx.

Sizes are found by arithmetic, not by algebra: every symbol (the batch, each rank) is set to a prime of its own that
divides no static extent, ONNX infers concrete shapes, and each extent is factored back into coefficient and symbols.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, shape_inference

from edgetune.bundle import TensorUse, Workspace
from edgetune.errors import ExportError

_FIRST_PRIME = 1009

# What onnxruntime's CPU kernels do, as measured (tests/engines holds these tables to the runtime): outputs that are
# views of their input, and outputs that take their input's memory when nobody reads it afterwards. Its arithmetic
# (Add, Sub, Mul, Div, Neg, Exp, Sqrt) always makes a new tensor.
VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})
IN_PLACE = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Tanh", "Clip", "Softmax", "LogSoftmax"})


def _primes() -> Iterator[int]:
    candidate = _FIRST_PRIME
    while True:
        if all(candidate % d for d in range(3, int(candidate**0.5) + 1, 2)):
            yield candidate
        candidate += 2


def symbolic_shapes(model: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    """Return the shape of every tensor of ``model``, whose inputs name their symbols as ``dim_param``.

    Raises:
        ExportError: a shape cannot be inferred, or an extent is not a product of integers and symbols.
    """
    symbols = dict.fromkeys(
        d.dim_param for v in model.graph.input for d in v.type.tensor_type.shape.dim if d.HasField("dim_param")
    )
    primes = _primes()
    first = _shapes_at(model, dict(zip(symbols, primes, strict=False)))
    second = _shapes_at(model, dict(zip(symbols, primes, strict=False)))
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


def _shapes_at(model: onnx.ModelProto, values: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Return the shapes that ONNX infers where every symbol has the prime ``values`` gives it, factored back."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.value_info[:]
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
    for tensor in inferred.graph.initializer:
        shapes[tensor.name] = tuple(str(d) for d in tensor.dims)
    return shapes


def _expression(extent: int, values: Mapping[str, int]) -> str:
    factors = []
    for symbol, prime in values.items():
        while extent % prime == 0 and extent:
            extent //= prime
            factors.append(symbol)
    return "*".join([str(extent), *factors]) if extent != 1 or not factors else "*".join(factors)


@dataclass(frozen=True)
class Lifetimes:
    """What the planner sees of a graph."""

    nodes: tuple[str, ...]
    tensors: tuple[TensorUse, ...]
    workspaces: tuple[Workspace, ...]


def lifetimes(
    model: onnx.ModelProto,
    kinds: Mapping[str, str],
    shapes: Mapping[str, tuple[str, ...]],
    dtypes: Mapping[str, str],
    boundary: int | None = None,
    in_place: Mapping[str, str] | None = None,
) -> Lifetimes:
    """Return lifetimes and sizes of all tensors of ``model``, in the order in which its nodes stand.

    Args:
        kinds: kind of the inputs, outputs and saved tensors by name; constants and transients need no entry.
        boundary: index of the first node of the second stage, where there are two. What crosses it is an output of the
            first stage and an input of the second, alive to the end; features that do not cross it die there.
        in_place: outputs that an engine writes over an input, as in ``GraphSpec.in_place``.
    """
    graph = model.graph
    end = len(graph.node)
    outputs = {o.name for o in graph.output}
    resident = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    first = dict.fromkeys(resident, -1)
    last: dict[str, int] = dict.fromkeys(resident | outputs, end)
    for index, node in enumerate(graph.node):
        for name in reads(node):
            last[name] = max(last.get(name, -1), index)
        for name in node.output:
            if name:
                first[name] = index
                last.setdefault(name, index)
    crossing: set[str] = set()
    if boundary is not None:
        crossing = {name for name, use in last.items() if use >= boundary > first[name] >= 0}
        last |= dict.fromkeys(crossing, end)
        read_later = {name for node in graph.node[boundary:] for name in reads(node)}
        last |= {
            n: boundary - 1 for n, kind in kinds.items() if kind == "feature" and n not in read_later and n in last
        }
    buffers = _buffers(graph.node, shapes, dtypes, last, resident, outputs | crossing) | dict(in_place or {})
    tensors = []
    for name, start in first.items():
        default = "transient" if start >= 0 else "constant"
        tensors.append(
            TensorUse(
                name, shapes[name], dtypes[name], kinds.get(name, default), start, last[name], buffers.get(name, name)
            )
        )
    return Lifetimes(tuple(n.name for n in graph.node), tuple(tensors), tuple(_workspaces(graph.node, shapes)))


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield every name that ``node`` reads, those of its subgraphs included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from reads(inner)


def _buffers(
    nodes: Sequence[onnx.NodeProto],
    shapes: Mapping[str, tuple[str, ...]],
    dtypes: Mapping[str, str],
    last: Mapping[str, int],
    resident: set[str],
    outputs: set[str],
) -> dict[str, str]:
    """Return, per tensor that owns no memory, the tensor whose memory it occupies."""
    owner: dict[str, str] = {}
    busy_until: dict[str, int] = {}

    def root(name: str) -> str:
        return owner.get(name, name)

    for index, node in enumerate(nodes):
        for name in node.output:
            busy_until[root(name)] = max(busy_until.get(root(name), -1), last.get(name, index))
        made = node.output[0] if node.output else ""
        if not made or made in outputs:
            continue
        base = root(node.input[0]) if node.input else ""
        if node.op_type in VIEWS:
            owner[made] = base
            busy_until[base] = max(busy_until.get(base, last.get(base, index)), last.get(made, index))
        elif node.op_type in IN_PLACE:
            free = base not in resident and base not in outputs and busy_until.get(base, index) <= index
            if free and dtypes[base] == dtypes[made]:
                owner[made] = base
                busy_until[base] = last.get(made, index)
    return owner


def element_types(model: onnx.ModelProto) -> dict[str, str]:
    """Return the numpy name of the element type of every tensor."""
    inferred = shape_inference.infer_shapes(model, strict_mode=True)
    types = {t.name: t.data_type for t in inferred.graph.initializer}
    for value in [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]:
        types[value.name] = value.type.tensor_type.elem_type
    return {name: str(np.dtype(helper.tensor_dtype_to_np_dtype(kind))) for name, kind in types.items()}


def _workspaces(nodes: Sequence[onnx.NodeProto], shapes: Mapping[str, tuple[str, ...]]) -> Iterator[Workspace]:
    """Scratch memory of kernels: the columns of one image in Conv and ConvTranspose, both selections in Where."""
    for index, node in enumerate(nodes):
        attributes: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "ConvTranspose":
            # column buffer [c·k·l / group, y·x] of one image
            yield Workspace(index, "*".join([*shapes[node.input[1]][1:], *shapes[node.input[0]][2:]]))
        elif node.op_type == "Where":
            yield Workspace(index, "*".join(["2", *shapes[node.output[0]]]))
        elif node.op_type == "Conv" and attributes.get("group", 1) == 1 and set(shapes[node.input[1]][2:]) != {"1"}:
            yield Workspace(index, "*".join([*shapes[node.input[1]][1:], *shapes[node.output[0]][2:]]))
