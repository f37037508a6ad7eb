"""Where the graph is cut: trunk (frozen) | tail (all that depends on what is trained). Knows the canonical graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from edgetune.autodiff.graph import ForwardGraph, Node, prune
from edgetune.errors import ExportError
from edgetune.export.probe import BATCH_SCOPE


@dataclass(frozen=True)
class Split:
    """The two halves. ``trunk_nodes`` is empty where everything is trained; ``features`` are the inputs of ``tail``
    besides the targets of a traced loss."""

    trunk_nodes: tuple[Node, ...]
    tail: ForwardGraph
    features: tuple[str, ...]


def split_graph(graph: ForwardGraph, trained: Collection[str]) -> Split:
    """Cut ``graph`` at the earliest trained tensor: the tail is all that depends on one, the trunk the rest.

    Several tensors may cross the cut (a residual block cut in its middle). Each becomes a feature [batch, ...]: a
    tensor in which the batch does not lead alone is laid out anew for the crossing. What depends on the targets of a
    traced loss belongs to the tail.

    Raises:
        ExportError: nothing trained reaches the output that the loss is computed from.
    """
    active, tail_nodes, trunk_nodes = set(trained) | set(graph.targets), list[Node](), list[Node]()
    for node in graph.nodes:
        if active.intersection(node.inputs) or _knows_batch(graph, node):
            active.update(node.outputs)
            tail_nodes.append(node)
        else:
            trunk_nodes.append(node)
    _check_reach(graph, trained)
    tail_nodes = prune(tail_nodes, graph.wanted)
    made = {name for node in tail_nodes for name in node.outputs}
    read = dict.fromkeys([*(i for node in tail_nodes for i in node.inputs if i), *graph.wanted])
    crossing = [n for n in read if n not in made and n not in graph.constants and n not in graph.targets]
    features, entries = [], list[Node]()
    for name in crossing:
        feature, leave, enter = _crossing(graph, name)
        features.append(feature)
        trunk_nodes += leave
        entries += enter
    tail_nodes = [*entries, *tail_nodes]
    used = {name for node in tail_nodes for name in node.inputs}
    constants = {name: value for name, value in graph.constants.items() if name in used}
    tail = dataclasses.replace(graph, nodes=tail_nodes, inputs=(*features, *graph.targets), constants=constants)
    return Split(tuple(prune(trunk_nodes, features)), tail, tuple(features))


def _knows_batch(graph: ForwardGraph, node: Node) -> bool:
    """Tell whether what ``node`` makes depends on the other samples: a trunk sees only some of the batch at a time.

    That is the size of the batch, the place of a sample in it (what ``probe`` made of a Range), or a mean over it.
    """
    counts = any(name and all(extent > 0 for extent in graph.shapes[name]) for name in node.outputs)
    return counts or (node.op == "CumSum" and node.inputs[0].startswith(BATCH_SCOPE))


def _check_reach(graph: ForwardGraph, trained: Collection[str]) -> None:
    reached = {name for node in prune(graph.nodes, [graph.goal]) for name in node.inputs}
    lost = [name for name in trained if name not in reached]
    if lost:
        raise ExportError(f"{', '.join(lost[:5])}: trained, but the loss does not depend on it; choose other layers")


def _crossing(graph: ForwardGraph, name: str) -> tuple[str, list[Node], list[Node]]:
    """Return the feature that carries tensor ``name`` over the cut, and the nodes that lay it out and back again."""
    shape = graph.shapes[name]
    if shape and shape[0] == 0 and all(extent > 0 for extent in shape[1:]):
        return name, [], []
    feature, back = f"{name}.by_sample", graph.reshape_target(name)
    axis = next(i for i, extent in enumerate(shape) if extent <= 0)
    kind = graph.dtypes[name]
    moved = [axis, *(i for i in range(len(shape)) if i != axis)]
    leave, enter = list[Node](), list[Node]()
    source, laid = name, tuple(shape[i] for i in moved)
    if axis:
        graph.shapes[f"{name}.moved"], graph.dtypes[f"{name}.moved"] = laid, kind
        leave.append(Node("Transpose", f"{name}.moved", (name,), (f"{name}.moved",), {"perm": moved}))
        source = f"{name}.moved"
    rows = laid[1:] if laid[0] == 0 else (-laid[0], *laid[1:])
    graph.shapes[feature], graph.dtypes[feature] = (0, *rows), kind
    leave.append(Node("Reshape", feature, (source, _constant(graph, [-1, *rows])), (feature,), {}))
    if axis:
        unmoved = [int(i) for i in np.argsort(moved)]
        split = f"{name}.split"
        graph.shapes[split], graph.dtypes[split] = laid, kind
        target = [-1 if extent <= 0 else extent for extent in laid]
        enter.append(Node("Reshape", split, (feature, _constant(graph, target)), (split,), {}))
        enter.append(Node("Transpose", name, (split,), (name,), {"perm": unmoved}))
    else:
        enter.append(Node("Reshape", name, (feature, _constant(graph, back)), (name,), {}))
    return feature, leave, enter


def _constant(graph: ForwardGraph, extents: list[int]) -> str:
    name = f"shape.{'x'.join(map(str, extents))}"
    graph.constants[name] = np.array(extents, np.int64)
    graph.shapes[name] = (len(extents),)
    return name
