"""Reverse rules of operators that reshape, join, split, repeat or pad, without looking at the elements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgetune.autodiff.graph import ForwardGraph, Node
from edgetune.autodiff.rule import Context, Rule, nothing, unbroadcast
from edgetune.autodiff.rules.axes import constant, integers, refuse_batch, scatter_along, target, zeros
from edgetune.errors import UnsupportedOperatorError, choices


# Reshape, Flatten, Squeeze, Unsqueeze: dX = dY in the shape of X
def _reshape(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    return {0: ctx.g.op("Reshape", dy, ctx.g.const(ctx.graph.reshape_target(node.inputs[0])), hint="dx")}


# Transpose: dX = dY, permuted back
def _transpose(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    rank = len(ctx.graph.shapes[node.inputs[0]])
    forward = list(node.attributes.get("perm", range(rank - 1, -1, -1)))
    return {0: ctx.g.op("Transpose", dy, perm=[int(i) for i in np.argsort(forward)], hint="dx")}


# Concat: each input's gradient is its own stretch of dY
def _concat(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, shapes = ctx.g, ctx.graph.shapes
    axis = int(node.attributes["axis"]) % len(shapes[node.outputs[0]])
    refuse_batch(node, shapes[node.outputs[0]], axis, "joins along")
    gradients, start = {}, 0
    for i, name in enumerate(node.inputs):
        end = start + shapes[name][axis]
        if i in wrt:
            gradients[i] = g.op("Slice", dy, g.const([start]), g.const([end]), g.const([axis]), hint="dx")
        start = end
    return gradients


# Split: dX = the parts' gradients, joined; zeros for a part that the loss does not depend on
def _split_many(ctx: Context, node: Node, wrt: frozenset[int], dys: Sequence[str | None]) -> Mapping[int, str]:
    g, shapes = ctx.g, ctx.graph.shapes
    axis = int(node.attributes.get("axis", 0)) % len(shapes[node.inputs[0]])
    refuse_batch(node, shapes[node.inputs[0]], axis, "splits")
    source, name = next((dy, name) for dy, name in zip(dys, node.outputs, strict=True) if dy is not None)
    parts = [
        zeros(g, shapes[part], source, shapes[name]) if dy is None else dy
        for dy, part in zip(dys, node.outputs, strict=True)
    ]
    return {0: g.op("Concat", *parts, axis=axis, hint="dx")}


def _split(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    return _split_many(ctx, node, wrt, [dy])


# Expand: dX = dY, summed over what was repeated
def _expand(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    return {0: unbroadcast(ctx, dy, node.inputs[0], node.outputs[0])}


# Tile: every repeated axis is split in (repetitions, extent); dX = dY, summed over the repetitions
def _tile(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, shape = ctx.g, ctx.graph.shapes[node.inputs[0]]
    split: list[int] = []
    over = []
    for extent, times in zip(shape, integers(ctx.graph, node, 1) or [], strict=True):
        if times > 1:
            over.append(len(split))
            split.append(times)
        split.append(extent)
    if not over:
        return {0: dy}
    parts = g.op("Reshape", dy, g.const(target(split)), hint="repetitions")
    return {0: g.op("ReduceSum", parts, g.const(over), keepdims=0, hint="dx")}


# Pad: constant: dX = dY without the border; reflect, edge: the border's gradient goes to the element that it copies
def _pad(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, shape = ctx.g, ctx.graph.shapes[node.inputs[0]]
    if 0 not in wrt or len(wrt) > 1:
        raise UnsupportedOperatorError(f"Pad '{node.name}': its padding value has no backward rule; make it a constant")
    pads = _full_pads(ctx.graph, node)
    mode = str(node.attributes.get("mode", "constant"))
    if mode == "constant":
        return {0: g.op("Pad", dy, g.const(-pads.reshape(-1)), hint="dx")} if pads.any() else {0: dy}
    if mode not in ("reflect", "edge") or (pads < 0).any():
        known = choices(["constant", "edge", "reflect"])
        raise UnsupportedOperatorError(
            f"Pad '{node.name}': mode '{mode}' with pads {pads.tolist()}; known are: {known}"
        )
    padded = list(ctx.graph.shapes[node.outputs[0]])
    for axis in np.flatnonzero(pads.any(axis=0)).tolist():
        refuse_batch(node, shape, axis, "pads")
        before, after = pads[:, axis].tolist()
        copied = np.pad(np.arange(shape[axis]), (before, after), mode="reflect" if mode == "reflect" else "edge")
        dy = scatter_along(g, dy, padded, axis, copied.tolist(), shape[axis])
        padded[axis] = shape[axis]
    return {0: dy}


def _full_pads(graph: ForwardGraph, node: Node) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Return [2, rank]: what is added before and behind each axis."""
    rank = len(graph.shapes[node.inputs[0]])
    given = constant(graph, node, 1).astype(np.int64).reshape(2, -1)
    axes = integers(graph, node, 3)
    pads = np.zeros((2, rank), np.int64)
    pads[:, [axis % rank for axis in axes] if axes is not None else slice(None)] = given
    return pads


# SpaceToDepth and DepthToSpace (DCR) undo each other; DepthToSpace (CRD) is [b, c, s, s, h, w] -> [b, c, h, s, w, s]
def _space_to_depth(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    return {0: ctx.g.op("DepthToSpace", dy, blocksize=int(node.attributes["blocksize"]), hint="dx")}


def _depth_to_space(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, size = ctx.g, int(node.attributes["blocksize"])
    if node.attributes.get("mode", "DCR") == "DCR":
        return {0: g.op("SpaceToDepth", dy, blocksize=size, hint="dx")}
    batch, channels, height, width = ctx.graph.shapes[node.inputs[0]]
    blocks = g.const(target([batch, channels // size**2, height, size, width, size]))
    moved = g.op("Transpose", g.op("Reshape", dy, blocks, hint="blocks"), perm=[0, 1, 3, 5, 2, 4], hint="moved")
    return {0: g.op("Reshape", moved, g.const(ctx.graph.reshape_target(node.inputs[0])), hint="dx")}


# Trilu: dX = the same triangle of dY
def _trilu(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    attributes: dict[str, Any] = {"upper": int(node.attributes.get("upper", 1))}
    if node.input(1):
        diagonal = ctx.g.const(constant(ctx.graph, node, 1).astype(np.int64))
        return {0: ctx.g.op("Trilu", dy, diagonal, hint="dx", **attributes)}
    return {0: ctx.g.op("Trilu", dy, hint="dx", **attributes)}


# CumSum: dX = the sum of dY from the other end
def _cum_sum(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    axis = constant(ctx.graph, node, 1).astype(np.int64)
    exclusive, reverse = (int(node.attributes.get(name, 0)) for name in ("exclusive", "reverse"))
    return {0: ctx.g.op("CumSum", dy, ctx.g.const(axis), exclusive=exclusive, reverse=1 - reverse, hint="dx")}


RULES = {
    "Reshape": Rule(nothing, _reshape, "nothing"),
    "Flatten": Rule(nothing, _reshape, "nothing"),
    "Squeeze": Rule(nothing, _reshape, "nothing"),
    "Unsqueeze": Rule(nothing, _reshape, "nothing"),
    "Transpose": Rule(nothing, _transpose, "nothing"),
    "Concat": Rule(nothing, _concat, "nothing"),
    "Split": Rule(nothing, _split, "nothing", backward_of_many=_split_many),
    "Expand": Rule(nothing, _expand, "nothing"),
    "Tile": Rule(nothing, _tile, "nothing"),
    "Pad": Rule(nothing, _pad, "nothing"),
    "SpaceToDepth": Rule(nothing, _space_to_depth, "nothing"),
    "DepthToSpace": Rule(nothing, _depth_to_space, "nothing"),
    "Trilu": Rule(nothing, _trilu, "nothing"),
    "CumSum": Rule(nothing, _cum_sum, "nothing"),
}
