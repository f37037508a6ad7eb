"""Constants that a model writes out once per sample go back to what they are: one constant that is broadcast.

A mask of attention is often made that way. Kept per sample it would be a feature of its own, and a sum with it a tensor
of the attention's size; and most such masks mask nothing. Knows the canonical graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from edgetune.autodiff.graph import ForwardGraph, Node, prune
from edgetune.codecs.base import Array
from edgetune.export.probe import BATCH_SCOPE

Evaluate = Callable[[Node, Mapping[str, Array]], Array]

_BROADCASTING = frozenset(
    ("Add", "Sub", "Mul", "Div", "And", "Or", "Not", "Where", "Cast", "Equal", "Greater", "Less", "GreaterOrEqual",
     "LessOrEqual", "Max", "Min", "Neg")
)  # fmt: skip


def share_constants(graph: ForwardGraph, evaluate: Evaluate) -> None:
    """Give readers of a constant that was written out along the batch the constant itself.

    Only readers that broadcast and have the batch from another operand. ``evaluate`` computes a node from the values of
    its inputs. Afterwards sums with zeros are dropped.
    """
    shared: dict[str, str] = {}  # a tensor that is the same for every sample -> the constant, extent 1 along the batch
    nodes: list[Node] = []
    for node in graph.nodes:
        nodes.append(node)
        value = _written_out(graph, node)
        known = node.op in _BROADCASTING and any(name in shared for name in node.inputs)
        if value is None and known and all(name in shared or name in graph.constants for name in node.inputs if name):
            inputs = {name: graph.constants[shared.get(name, name)] for name in node.inputs if name}
            value = evaluate(node, inputs)
        if value is not None:
            shared[node.outputs[0]] = _add(graph, f"{node.outputs[0]}.shared", value)
        elif known and _batch_without(graph, node, shared):
            nodes[-1] = dataclasses.replace(node, inputs=tuple(shared.get(name, name) for name in node.inputs))
    graph.nodes = prune(_without_zeros(graph, nodes), graph.wanted)


def _written_out(graph: ForwardGraph, node: Node) -> Array | None:
    """Return the constant that ``node`` writes out along the batch, if that is what it does."""
    if node.op not in ("Add", "And") or not all(name in graph.constants for name in node.inputs[:1]):
        return None
    if not node.inputs[1].startswith(BATCH_SCOPE):
        return None
    value = graph.constants[node.inputs[0]]
    return np.asarray(value.reshape((1,) * (len(graph.shapes[node.outputs[0]]) - value.ndim) + value.shape))


def _batch_without(graph: ForwardGraph, node: Node, shared: Mapping[str, str]) -> bool:
    """Tell whether ``node`` makes the same shape if its shared inputs are broadcast."""
    shapes = [graph.shapes[shared.get(name, name)] for name in node.inputs if name]
    made = graph.shapes[node.outputs[0]]
    for place in range(1, len(made) + 1):
        extents = {shape[-place] for shape in shapes if len(shape) >= place} - {1}
        if made[-place] != 1 and made[-place] not in extents:
            return False
    return True


def _without_zeros(graph: ForwardGraph, nodes: list[Node]) -> list[Node]:
    """Drop every Add of zeros that changes no shape."""
    renamed: dict[str, str] = {}
    kept = []
    for node in nodes:
        node = dataclasses.replace(node, inputs=tuple(renamed.get(name, name) for name in node.inputs))
        if node.op == "Add" and node.outputs[0] not in graph.wanted:
            for zero, other in (node.inputs, node.inputs[::-1]):
                fixed = zero in graph.constants and zero not in graph.parameters and not graph.constants[zero].any()
                if fixed and graph.shapes[other] == graph.shapes[node.outputs[0]]:
                    renamed[node.outputs[0]] = other
                    break
            if node.outputs[0] in renamed:
                continue
        kept.append(node)
    return kept


def _add(graph: ForwardGraph, name: str, value: Array) -> str:
    graph.constants[name] = value
    graph.shapes[name] = value.shape
    return name
