"""What becomes of batch-norm, once it is known what is trained. Knows the canonical graph.

frozen, behind a frozen convolution    folded into its weight and bias
frozen, behind a trained convolution   a scale of its weight, computed in every step, and a bias, where that is cheaper
frozen, elsewhere                      a scale and a shift
frozen, but its γ or β are trained     left as it is, in evaluation mode
trained                                statistics of the batch; the running ones go on, as in torch's training mode
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import numpy as np
import onnx

from edgetune.autodiff.convolution import SCALE
from edgetune.autodiff.graph import ForwardGraph, Node
from edgetune.errors import ExportError

BATCH = 32
"""How many samples a batch is taken to have, where it matters whether weights or activations are more."""


def norm_parameters(graph: ForwardGraph, after: Collection[str]) -> list[str]:
    """Return γ and β of every batch-norm that depends on a tensor in ``after``, in execution order."""
    active, found = set(after), list[str]()
    for node in graph.nodes:
        if active.intersection(node.inputs):
            active.update(node.outputs)
            if node.op == "BatchNormalization":
                found += [name for name in node.inputs[1:3] if name in graph.parameters]
    return found


def settle_batch_norm(
    graph: ForwardGraph, trained_nodes: Collection[str], trained: Collection[str], *, batch_statistics: bool
) -> list[str]:
    """Replace every BatchNormalization by what it computes.

    Args:
        trained_nodes: names of the convolutions that are trained.
        trained: names of the trained tensors.
        batch_statistics: batch-norm whose γ and β are trained normalises with the statistics of the batch.

    Returns:
        the running statistics that a step changes.
    """
    buffers: list[str] = []
    kept: list[Node] = []
    for node in graph.nodes:
        if node.op == "BatchNormalization" and batch_statistics and set(node.inputs[1:3]) & set(trained):
            if node.inputs[3] in buffers:
                raise ExportError(
                    f"batch-norm '{node.outputs[0]}' shares its statistics '{node.inputs[3]}' with another place of "
                    "the model; such ones can only be left frozen (--batch-norm frozen)"
                )
            outputs = (node.outputs[0], *(f"new/{name}" for name in node.inputs[3:5]))
            for old, new in zip(node.inputs[3:5], outputs[1:], strict=True):
                graph.shapes[new] = graph.shapes[old]
                graph.dtypes[new] = onnx.TensorProto.FLOAT
            buffers += node.inputs[3:5]
            node = dataclasses.replace(node, outputs=outputs, attributes={**node.attributes, "training_mode": 1})
        kept.append(node)
    graph.nodes = kept
    _fold_frozen_norms(graph, trained_nodes, trained)
    return buffers


def _fold_frozen_norms(graph: ForwardGraph, trained_nodes: Collection[str], trained: Collection[str]) -> None:
    """Replace every BatchNormalization that is frozen whole.

    With s = γ/√(σ² + ε) and t = β - μ·s: behind a frozen convolution it is folded into weight and bias. Behind a
    trained one (node names in ``trained_nodes``) it becomes a scale and a shift, of the weight or of what it makes, so
    that the trained tensor is the model's own weight, and its gradient the one that the model's own framework computes.
    """
    readers = graph.consumers()
    producer = {name: node for node in graph.nodes for name in node.outputs}
    result: list[Node] = []
    for node in graph.nodes:
        if node.op != "BatchNormalization" or set(node.inputs[1:3]) & set(trained):
            result.append(node)
            continue
        gamma, beta, mean, variance = (graph.constants[name].astype(np.float64) for name in node.inputs[1:5])
        scale = gamma / np.sqrt(variance + float(node.attributes.get("epsilon", 1e-5)))
        shift = beta - mean * scale
        before = producer.get(node.inputs[0])
        foldable = (
            before is not None
            and before.op == "Conv"
            and before.inputs[1] in graph.constants
            and before.outputs[0] not in graph.wanted
            and before.name not in trained_nodes
            and before.input(2) not in trained
        )
        if before is not None and foldable and len(readers[node.inputs[0]]) == 1:
            folded = _folded_convolution(graph, before, node.outputs[0], scale, shift)
            result = [folded if n is before else n for n in result]
            producer[node.outputs[0]] = folded
        elif before is not None and _scalable(graph, before, trained) and len(readers[node.inputs[0]]) == 1:
            scaled = _scaled_convolution(graph, before, node.outputs[0], scale, shift)
            result = [scaled if n is before else n for n in result]
            producer[node.outputs[0]] = scaled
        else:
            result.extend(_scale_and_shift(graph, node, scale, shift))
    graph.nodes = result


def _add_constant(graph: ForwardGraph, name: str, value: Any) -> str:
    graph.constants[name] = value.astype(np.float32)
    graph.shapes[name] = value.shape
    return name


def _folded_convolution(graph: ForwardGraph, conv: Node, output: str, scale: Any, shift: Any) -> Node:
    weight = graph.constants[conv.inputs[1]].astype(np.float64)
    bias = graph.constants[conv.inputs[2]].astype(np.float64) if conv.input(2) else np.zeros_like(scale)
    column = scale.reshape(-1, *[1] * (weight.ndim - 1))
    inputs = (
        conv.inputs[0],
        _add_constant(graph, f"{conv.inputs[1]}.folded.{output}", weight * column),
        _add_constant(graph, f"{conv.inputs[1]}.folded_bias.{output}", bias * scale + shift),
    )
    return Node("Conv", output, inputs, (output,), conv.attributes)


def _scalable(graph: ForwardGraph, conv: Node, trained: Collection[str]) -> bool:
    """Tell whether it is cheaper to scale the trained weight of ``conv`` in every step than what it makes.

    That is so where an output channel has fewer weights than a batch has positions.
    """
    if conv.op != "Conv" or conv.outputs[0] in graph.wanted or conv.input(2) in trained or conv.input(SCALE):
        return False
    if conv.input(2) and conv.inputs[2] not in graph.constants:
        return False
    return math.prod(graph.shapes[conv.inputs[1]][1:]) <= BATCH * math.prod(graph.shapes[conv.outputs[0]][2:])


def _scaled_convolution(graph: ForwardGraph, conv: Node, output: str, scale: Any, shift: Any) -> Node:
    """Return ``conv`` with batch-norm as a fourth input [o, 1, 1..], which multiplies its weight, and as its bias."""
    bias = graph.constants[conv.inputs[2]].astype(np.float64) * scale if conv.input(2) else 0.0
    extents = (-1, *[1] * (len(graph.shapes[conv.inputs[1]]) - 1))
    own = (
        _add_constant(graph, f"{output}.shift", bias + shift),
        _add_constant(graph, f"{output}.scale", scale.reshape(extents)),
    )
    return dataclasses.replace(conv, inputs=(*conv.inputs[:2], *own), outputs=(output,))


def _scale_and_shift(graph: ForwardGraph, node: Node, scale: Any, shift: Any) -> list[Node]:
    extents = (-1, *[1] * (len(graph.shapes[node.outputs[0]]) - 2))
    scaled = f"{node.outputs[0]}.scaled"
    graph.shapes[scaled] = graph.shapes[node.outputs[0]]
    graph.dtypes[scaled] = graph.dtypes.get(node.outputs[0], onnx.TensorProto.FLOAT)
    s = _add_constant(graph, f"{node.outputs[0]}.scale", scale.reshape(extents))
    t = _add_constant(graph, f"{node.outputs[0]}.shift", shift.reshape(extents))
    return [
        Node("Mul", scaled, (node.inputs[0], s), (scaled,), {}),
        Node("Add", node.outputs[0], (scaled, t), node.outputs[:1], {}),
    ]
