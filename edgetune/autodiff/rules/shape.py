"""Reverse rules of operators that move elements without changing them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgetune.autodiff.graph import Node
from edgetune.autodiff.rule import Context, Rule, nothing
from edgetune.errors import UnsupportedOperatorError


# Reshape, Flatten, Squeeze, Unsqueeze: dX = dY in the shape of X
def _reshape(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    target = [-1 if extent <= 0 else extent for extent in ctx.graph.shapes[node.inputs[0]]]
    return {0: ctx.g.op("Reshape", dy, ctx.g.const(target), hint="dx")}


# Transpose: dX = dY, permuted back
def _transpose(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    rank = len(ctx.graph.shapes[node.inputs[0]])
    forward = list(node.attributes.get("perm", range(rank - 1, -1, -1)))
    return {0: ctx.g.op("Transpose", dy, perm=[int(i) for i in np.argsort(forward)], hint="dx")}


# Concat: each input's gradient is its own stretch of dY
def _concat(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, shapes = ctx.g, ctx.graph.shapes
    axis = int(node.attributes["axis"]) % len(shapes[node.outputs[0]])
    if shapes[node.outputs[0]][axis] == 0:
        raise UnsupportedOperatorError(f"Concat '{node.name}' joins along the batch; samples must stay independent")
    gradients, start = {}, 0
    for i, name in enumerate(node.inputs):
        end = start + shapes[name][axis]
        if i in wrt:
            gradients[i] = g.op("Slice", dy, g.const([start]), g.const([end]), g.const([axis]), hint="dx")
        start = end
    return gradients


# Pad with a constant: dX = dY without the border
def _pad(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    if node.attributes.get("mode", "constant") != "constant" or node.input(3):
        raise UnsupportedOperatorError(f"Pad '{node.name}': only mode 'constant' over all axes has a backward rule")
    pads = -ctx.graph.constants[node.inputs[1]].astype(np.int64)
    return {0: ctx.g.op("Pad", dy, ctx.g.const(pads), hint="dx")}


RULES = {
    "Reshape": Rule(nothing, _reshape, "nothing"),
    "Flatten": Rule(nothing, _reshape, "nothing"),
    "Squeeze": Rule(nothing, _reshape, "nothing"),
    "Unsqueeze": Rule(nothing, _reshape, "nothing"),
    "Transpose": Rule(nothing, _transpose, "nothing"),
    "Concat": Rule(nothing, _concat, "nothing"),
    "Pad": Rule(nothing, _pad, "nothing"),
}
