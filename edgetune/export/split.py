"""Which layers are trained, and where the graph is cut: trunk (frozen) | tail (last N layers and the head).

Knows the canonical graph.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from edgetune.autodiff.graph import ForwardGraph, Node, prune
from edgetune.errors import ExportError, UsageError

WEIGHT_OPS = {"Conv": "Conv", "Gemm": "Linear", "MatMul": "Linear"}


@dataclass(frozen=True)
class WeightLayer:
    """A Conv or Linear node with a constant weight. ``bias`` names its bias, if it has one."""

    name: str
    node: str
    op: str
    weight: str
    bias: str | None


@dataclass(frozen=True)
class Split:
    """The two halves. ``trunk`` has no nodes where everything is trained; its outputs are the inputs of ``tail``."""

    trunk_nodes: tuple[Node, ...]
    tail: ForwardGraph
    features: tuple[str, ...]


def weight_layers(graph: ForwardGraph) -> list[WeightLayer]:
    """Return all weight layers in execution order; each is named after its weight."""
    readers = graph.consumers()
    found: list[WeightLayer] = []
    for node in graph.nodes:
        if node.op not in WEIGHT_OPS or node.input(1) not in graph.constants:
            continue
        if node.op == "MatMul" and len(graph.shapes[node.inputs[1]]) != 2:
            continue  # a constant that is multiplied with, not the weight of a linear layer
        bias = node.input(2) or None
        if node.op == "MatMul":
            after = readers.get(node.outputs[0], [])
            adds = [n for n in after if n.op == "Add" and len(after) == 1]
            vectors = [i for n in adds for i in n.inputs if i in graph.constants and len(graph.shapes[i]) == 1]
            bias = vectors[0] if vectors else None
        weight = node.inputs[1]
        name = weight.removesuffix(".weight") if weight.endswith(".weight") else weight
        if name in {layer.name for layer in found}:
            name = f"{name}@{node.name}"  # a weight that two layers share
        found.append(WeightLayer(name, node.name, WEIGHT_OPS[node.op], weight, bias))
    return found


def choose_trained(graph: ForwardGraph, last: int) -> tuple[list[WeightLayer], WeightLayer]:
    """Return the trained layers before the head, in execution order, and the head.

    The head is the weight layer nearest to the output; ``last`` counts the weight layers before it.

    Raises:
        UsageError: the model has fewer layers.
    """
    layers = weight_layers(graph)
    if not layers:
        raise ExportError("the model has no convolution or linear layer with a constant weight: nothing can be trained")
    *body, head = layers
    if not 0 <= last <= len(body):
        raise UsageError(f"--last {last}: the model has {len(body)} convolution and linear layers before its head")
    return body[len(body) - last :], head


def replace_head(graph: ForwardGraph, classes: int, seed: int = 0) -> None:
    """Give the classifier ``classes`` outputs and fresh weights, uniform in ±1/√fan-in (He et al. 2015, as torch).

    Raises:
        UsageError: fewer than two classes.
        ExportError: something behind the classifier depends on the number of outputs.
    """
    if classes < 2:
        raise UsageError(f"--new-head {classes}: a classifier has two classes at least")
    head = weight_layers(graph)[-1]
    node = next(n for n in graph.nodes if n.name == head.node)
    weight = graph.constants[head.weight]
    out_first = node.op == "Conv" or bool(node.attributes.get("transB", 0))
    shape = (classes, *weight.shape[1:]) if out_first else (weight.shape[0], classes)
    fan_in = int(np.prod(weight.shape[1:])) if out_first else weight.shape[0]
    old = weight.shape[0] if out_first else weight.shape[1]
    rng = np.random.default_rng(seed)
    bound = 1.0 / np.sqrt(fan_in)
    graph.constants[head.weight] = rng.uniform(-bound, bound, shape).astype(np.float32)
    graph.shapes[head.weight] = shape
    if head.bias:
        graph.constants[head.bias] = np.zeros(classes, np.float32)
        graph.shapes[head.bias] = (classes,)
    position = graph.nodes.index(node)
    for later in graph.nodes[position:]:
        if later.op == "Reshape" and later.input(1) in graph.constants:
            target = graph.constants[later.inputs[1]]
            graph.constants[later.inputs[1]] = np.where(target == old, classes, target)
        for name in later.outputs:
            extents = graph.shapes[name]
            if old not in extents:
                raise ExportError(
                    f"the classifier's outputs are mixed by {later.op} '{later.name}'; its head cannot be replaced"
                )
            axis = extents.index(old)
            graph.shapes[name] = (*extents[:axis], classes, *extents[axis + 1 :])
        if any(i in graph.constants and old in np.shape(graph.constants[i]) for i in later.inputs if later is not node):
            raise ExportError(
                f"{later.op} '{later.name}' holds constants for {old} classes; its head cannot be replaced"
            )


def split_graph(graph: ForwardGraph, trained_weights: set[str]) -> Split:
    """Cut ``graph`` at the earliest trained tensor: the tail is all that depends on one, the trunk the rest.

    Several tensors may cross the cut (a residual block cut in its middle).

    Raises:
        ExportError: nothing trained reaches the output.
    """
    active, tail_nodes, trunk_nodes = set(trained_weights), [], []
    for node in graph.nodes:
        if active.intersection(node.inputs):
            active.update(node.outputs)
            tail_nodes.append(node)
        else:
            trunk_nodes.append(node)
    if graph.output not in active:
        raise ExportError("the trained layers do not reach the model's output")
    tail_nodes = prune(tail_nodes, [graph.output])
    made = {name for node in tail_nodes for name in node.outputs}
    read = dict.fromkeys(i for node in tail_nodes for i in node.inputs if i)
    features = tuple(name for name in read if name not in made and name not in graph.constants)
    used = set(read)
    constants = {name: value for name, value in graph.constants.items() if name in used}
    tail = dataclasses.replace(graph, nodes=tail_nodes, inputs=features, constants=constants)
    for name in features:
        try:
            graph.sample_shape(name)
        except ValueError as error:
            raise ExportError(f"the cut crosses a tensor without a leading batch axis: {error}") from None
    return Split(tuple(prune(trunk_nodes, features)), tail, features)
