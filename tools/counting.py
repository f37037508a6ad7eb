"""What a graph costs by count: multiply-accumulates, elements, bytes moved, nodes. No clock, so no mood of a machine.

A pure function of the graph's nodes and of the shapes of its tensors. It counts what the operators ask for, not what a
runtime makes of them: a Conv is counted by its definition, whether or not it is computed that way. Knows onnx.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass

import numpy as np
import onnx
from onnx import helper, shape_inference

from edgetune.bundle import GraphSpec
from edgetune.planning.lifetimes import VIEWS
from edgetune.planning.sizes import evaluate

# Of these operators only what they take of their first input is read.
_PICKS = frozenset({"Slice", "Gather", "GatherND", "GatherElements", "Split"})


@dataclass(frozen=True)
class Tensor:
    """A shape, and the bytes of one element."""

    shape: tuple[int, ...]
    itemsize: int = 4

    @property
    def elements(self) -> int:
        """How many elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """How many bytes."""
        return self.elements * self.itemsize


@dataclass(frozen=True)
class Count:
    """What some nodes cost.

    Attributes:
        macs: multiply-accumulates of Conv, ConvTranspose, MatMul and Gemm.
        elements: elements that all other operators make.
        bytes: read and written, every operand once per node; a change of shape moves nothing.
        nodes: nodes that are executed, those of a Scan's body once per round.
    """

    macs: int = 0
    elements: int = 0
    bytes: int = 0
    nodes: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> Count:
        return Count(*(times * a for a in astuple(self)))

    @property
    def flops(self) -> int:
        """Floating-point operations: two per multiply-accumulate, one per other element."""
        return 2 * self.macs + self.elements


def count_graph(model: onnx.ModelProto, spec: GraphSpec, symbols: Mapping[str, int]) -> Count:
    """Return what one run of ``model``, the flat file of ``spec``, costs where the symbols have these values.

    Raises:
        BundleError: a shape holds a symbol that ``symbols`` lacks.
    """
    known = {
        use.name: Tensor(tuple(evaluate(extent, symbols) for extent in use.shape), np.dtype(use.dtype).itemsize)
        for use in spec.tensors
    }
    return count_nodes(model.graph.node, known, model.opset_import[0].version)


def count_nodes(nodes: Iterable[onnx.NodeProto], known: Mapping[str, Tensor], opset: int) -> Count:
    """Return what ``nodes`` cost; ``known`` has every tensor that they read or make."""
    total = Count()
    for node in nodes:
        inputs = [known[name] for name in node.input if name]
        outputs = [known[name] for name in node.output if name]
        total += _scan(node, inputs, outputs, known, opset) if node.op_type == "Scan" else _node(node, inputs, outputs)
    return total


def _node(node: onnx.NodeProto, inputs: list[Tensor], outputs: list[Tensor]) -> Count:
    if node.op_type in VIEWS:
        return Count(nodes=1)
    macs = _macs(node.op_type, inputs, outputs)
    made = 0 if macs else sum(tensor.elements for tensor in outputs)
    written = sum(tensor.bytes for tensor in outputs)
    read = written if node.op_type in _PICKS else sum(tensor.bytes for tensor in inputs)
    return Count(macs, made, read + written, 1)


def _macs(op: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Return the multiply-accumulates, 0 for operators that have none."""
    if op == "Conv":  # [b, o, y, x] from [o, c / groups, k, l]
        return outputs[0].elements * math.prod(inputs[1].shape[1:])
    if op == "ConvTranspose":  # from [b, c, h, w] by [c, o / groups, k, l]
        return inputs[0].elements * math.prod(inputs[1].shape[1:])
    if op == "MatMul":
        return outputs[0].elements * inputs[0].shape[-1]
    if op == "Gemm":  # [m, n]; a transposed first operand has as many elements
        return outputs[0].elements * (inputs[0].elements // outputs[0].shape[0])
    return 0


def _scan(
    node: onnx.NodeProto, inputs: list[Tensor], outputs: list[Tensor], known: Mapping[str, Tensor], opset: int
) -> Count:
    """Return what a Scan over axis 0 costs: its body once per round, its states are read and written there."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    body, scanned = attributes["body"], int(attributes["num_scan_inputs"])
    states = len(inputs) - scanned
    rounds: int = inputs[states].shape[0]
    inner = {v.name: t for v, t in zip(body.input, inputs[:states], strict=False)}  # the rest follows
    for value, tensor in zip(body.input[states:], inputs[states:], strict=True):
        inner[value.name] = Tensor(tensor.shape[1:], tensor.itemsize)
    inner |= {t.name: Tensor(tuple(t.dims), _itemsize(t.data_type)) for t in body.initializer}
    own = {name for n in body.node for name in n.output}
    inner |= {name: known[name] for n in body.node for name in n.input if name and name not in own | inner.keys()}
    return count_nodes(body.node, inner | _inferred(body, inner, opset), opset) * rounds


def _inferred(body: onnx.GraphProto, given: Mapping[str, Tensor], opset: int) -> dict[str, Tensor]:
    """Return the tensors that the nodes of ``body`` make, as ONNX infers them from what is ``given``."""
    stored = {t.name for t in body.initializer}
    types = {v.name: v.type.tensor_type.elem_type for v in body.input}
    inputs = [
        helper.make_tensor_value_info(name, types.get(name) or onnx.TensorProto.FLOAT, tensor.shape)
        for name, tensor in given.items()
        if name not in stored
    ]
    outputs = [onnx.ValueInfoProto(name=value.name) for value in body.output]
    graph = helper.make_graph(body.node, "body", inputs, outputs, body.initializer)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    found = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    return {
        v.name: Tensor(
            tuple(d.dim_value for d in v.type.tensor_type.shape.dim), _itemsize(v.type.tensor_type.elem_type)
        )
        for v in (*found.value_info, *found.output)
    }


def _itemsize(element_type: int) -> int:
    return int(np.dtype(helper.tensor_dtype_to_np_dtype(element_type)).itemsize)
