"""Operators that stock runtimes expand themselves, in an order of their own, are expanded here, in ours.

ONNX defines some operators as functions of others; a runtime without a kernel for one inlines it at load, and the new
nodes lose their place in the emitted order. Knows the builder.
"""

from __future__ import annotations

from collections.abc import Callable

from onnx import helper

from edgetune.autodiff.builder import GraphBuilder
from edgetune.autodiff.graph import Node
from edgetune.autodiff.linear import emit_linear


def _hard_swish(g: GraphBuilder, node: Node) -> None:
    # y = x · HardSigmoid(x; 1/6, 1/2): the operator's definition in the ONNX standard
    gate = g.op("HardSigmoid", node.inputs[0], alpha=1.0 / 6.0, beta=0.5, hint=f"{node.name}.gate")
    g.nodes.append(helper.make_node("Mul", [node.inputs[0], gate], list(node.outputs), name=node.name))


_LOWERED: dict[str, Callable[[GraphBuilder, Node], None]] = {"HardSwish": _hard_swish, "Linear": emit_linear}


def emit_node(g: GraphBuilder, node: Node) -> None:
    """Append ``node`` to ``g``, expanded where a runtime would."""
    lower = _LOWERED.get(node.op)
    if lower is None:
        g.nodes.append(node.to_proto())
    else:
        lower(g, node)
