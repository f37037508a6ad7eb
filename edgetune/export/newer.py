"""Operators that the version converter has no way for to the project's opset, in operators that it has. Knows onnx."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

_SCALE_PER_CHANNEL = 21  # GroupNormalization has one scale per channel from that opset on; before, one per group


def expand_newer(model: onnx.ModelProto, version: int) -> None:
    """Replace in ``model``, of opset ``version``, in place: Gelu (new in opset 20), Swish (new in opset 24) and
    GroupNormalization (no shape inference in 18, no converter from 21).

    The first two become one node again in the canonical graph (``activations``), which has no converter to pass.
    """
    graph = model.graph
    taken = {name for node in graph.node for name in [*node.input, *node.output]}
    nodes: list[onnx.NodeProto] = []

    def make(op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = output or next(n for n in (f"{op.lower()}.expanded.{i}" for i in itertools.count()) if n not in taken)
        taken.add(name)
        nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def const(value: object) -> str:
        tensor = numpy_helper.from_array(np.asarray(value))
        return make("Constant", value=tensor)

    for node in list(graph.node):
        if node.op_type == "Gelu":
            _gelu(node, make, const)
        elif node.op_type == "Swish":
            _swish(node, make, const)
        elif node.op_type == "GroupNormalization":
            _group_norm(node, make, const, version)
        else:
            nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _gelu(node: onnx.NodeProto, make: Callable[..., str], const: Callable[[object], str]) -> None:
    # y = x·Φ(x), Φ(x) = (1 + erf(x/√2))/2, or its approximation by tanh(√(2/π)·(x + 0.044715·x³))
    x = node.input[0]
    if any(a.name == "approximate" and a.s == b"tanh" for a in node.attribute):
        cube = make("Mul", make("Mul", x, x), make("Mul", x, const(np.float32(0.044715))))
        inner = make("Tanh", make("Mul", make("Add", x, cube), const(np.float32(math.sqrt(2.0 / math.pi)))))
    else:
        inner = make("Erf", make("Mul", x, const(np.float32(math.sqrt(0.5)))))
    share = make("Mul", make("Add", inner, const(np.float32(1.0))), const(np.float32(0.5)))
    make("Mul", x, share, output=node.output[0])


def _swish(node: onnx.NodeProto, make: Callable[..., str], const: Callable[[object], str]) -> None:
    # y = x·σ(αx)
    x = node.input[0]
    alpha = next((a.f for a in node.attribute if a.name == "alpha"), 1.0)
    gate = make("Sigmoid", x if alpha == 1.0 else make("Mul", x, const(np.float32(alpha))))
    make("Mul", x, gate, output=node.output[0])


def _group_norm(node: onnx.NodeProto, make: Callable[..., str], const: Callable[[object], str], version: int) -> None:
    # An instance norm whose channels are the groups; then the scale and the shift per channel (opset 21)
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    groups, epsilon = int(attributes["num_groups"]), float(attributes.get("epsilon", 1e-5))
    x, scale, bias = node.input
    grouped = make("Reshape", x, const(np.array([0, groups, -1])))
    shape = make("Shape", x)
    if version < _SCALE_PER_CHANNEL:
        normed = make("InstanceNormalization", grouped, scale, bias, epsilon=epsilon)
        make("Reshape", normed, shape, output=node.output[0])
        return
    ones, zeros = const(np.ones(groups, np.float32)), const(np.zeros(groups, np.float32))
    normed = make("InstanceNormalization", grouped, ones, zeros, epsilon=epsilon)
    channels = make("Reshape", x, const(np.array([0, 0, -1])))  # every position on one axis, whatever the rank
    by_channel = make("Reshape", normed, make("Shape", channels))
    scaled = make("Mul", by_channel, make("Unsqueeze", scale, const(np.array([1]))))
    shifted = make("Add", scaled, make("Unsqueeze", bias, const(np.array([1]))))
    make("Reshape", shifted, shape, output=node.output[0])
