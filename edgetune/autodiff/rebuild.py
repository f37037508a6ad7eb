"""A stretch of the forward pass, emitted a second time: what is stored nowhere is computed again. Knows the builder."""

from __future__ import annotations

import dataclasses
from collections.abc import Container

from edgetune.autodiff.builder import GraphBuilder
from edgetune.autodiff.graph import ForwardGraph
from edgetune.autodiff.lowering import emit_node


def rebuild(g: GraphBuilder, graph: ForwardGraph, tensor: str, available: Container[str]) -> str:
    """Emit the nodes that make ``tensor`` from ``available`` tensors and constants; return the new tensor's name."""
    needed, nodes = {tensor}, []
    for node in reversed(graph.nodes):
        made = needed.intersection(node.outputs)
        if made:
            nodes.append(node)
            needed -= made
            needed.update(name for name in node.inputs if name not in available)
    again: dict[str, str] = {}
    shapes, dtypes = dict(graph.shapes), dict(graph.dtypes)
    for node in reversed(nodes):
        for name in node.outputs:
            if name:
                again[name] = g.fresh(f"again/{name}")
                shapes[again[name]] = graph.shapes[name]
                if name in graph.dtypes:
                    dtypes[again[name]] = graph.dtypes[name]
        copy = dataclasses.replace(
            node,
            name=f"{g.scope}/again/{node.name}",
            inputs=tuple(again.get(name, name) for name in node.inputs),
            outputs=tuple(again.get(name, name) for name in node.outputs),
        )
        emit_node(g, copy, dataclasses.replace(graph, shapes=shapes, dtypes=dtypes))
    return again.get(tensor, tensor)
