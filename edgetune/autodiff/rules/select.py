"""Reverse rules of operators that pick elements by index, or put them: the gradient is put where it was picked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgetune.autodiff.builder import GraphBuilder
from edgetune.autodiff.graph import ForwardGraph, Node
from edgetune.autodiff.lowering import batch_ones
from edgetune.autodiff.rule import Context, Rule, Want, nothing
from edgetune.autodiff.rules.axes import ROUNDS, expand, integers, refuse_batch, scatter_along, target, zeros
from edgetune.codecs.base import Use
from edgetune.errors import UnsupportedOperatorError

_INT64 = 7  # onnx.TensorProto.INT64


# Slice: dX = dY between zeros
def _slice(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, graph = ctx.g, ctx.graph
    shape, sliced = graph.shapes[node.inputs[0]], list(graph.shapes[node.outputs[0]])
    starts, ends = integers(graph, node, 1, "starts") or [], integers(graph, node, 2, "ends") or []
    axes = integers(graph, node, 3, "axes") or list(range(len(starts)))
    steps = integers(graph, node, 4) or [1] * len(starts)
    pads = np.zeros((2, len(shape)), np.int64)
    apart = []
    for start, end, axis, step in zip(starts, ends, (axis % len(shape) for axis in axes), steps, strict=True):
        if shape[axis] <= 0:
            if step != 1 or sliced[axis] != shape[axis]:
                refuse_batch(node, shape, axis, "takes a part of")
            continue
        picked = list(range(shape[axis]))[start:end:step]
        if step == 1:
            pads[:, axis] = picked[0], shape[axis] - 1 - picked[-1]
        else:
            apart.append((axis, picked))
    for axis, picked in apart:
        dy = scatter_along(g, dy, sliced, axis, picked, shape[axis])
        sliced[axis] = shape[axis]
    return {0: g.op("Pad", dy, g.const(pads.reshape(-1)), hint="dx") if pads.any() else dy}


# Gather: dX[.., i[j], ..] += dY[.., j, ..]; also the gradient of an embedding's table. Constant indices that pick few
# elements twice: gathers from dY (``scatter_along``); else a scatter that adds.
def _gather_axis(graph: ForwardGraph, node: Node) -> int:
    return int(node.attributes.get("axis", 0)) % len(graph.shapes[node.inputs[0]])


def _few_times(graph: ForwardGraph, node: Node) -> list[int] | None:
    """Return constant indices, each counted from the front, if none of them occurs often."""
    if node.inputs[1] not in graph.constants:
        return None
    extent = graph.shapes[node.inputs[0]][_gather_axis(graph, node)]
    indices = [int(i) % extent for i in graph.constants[node.inputs[1]].reshape(-1)] if extent > 0 else []
    return indices if indices and max(np.bincount(indices)) <= ROUNDS else None


def _indices_wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    return [Want(node.inputs[1], Use.VALUE)] if node.inputs[1] not in graph.constants else []


def _gather(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    if 0 not in wrt:
        return {}
    g, graph = ctx.g, ctx.graph
    shape, index_shape = graph.shapes[node.inputs[0]], graph.shapes[node.inputs[1]]
    axis = _gather_axis(graph, node)
    refuse_batch(node, shape, axis, "picks from")
    before, after = list(shape[:axis]), list(shape[axis + 1 :])
    few = _few_times(graph, node)
    if few is not None:
        flat = [*before, len(few), *after]
        if len(index_shape) != 1:
            dy = g.op("Reshape", dy, g.const(target(flat)), hint="dy")
        return {0: scatter_along(g, dy, flat, axis, few, shape[axis])}
    places = ctx.value(node.inputs[1])
    if graph.dtypes.get(node.inputs[1], _INT64) != _INT64:
        places = g.op("Cast", places, to=_INT64, hint="places")
    count = math.prod(index_shape)
    flat = [*before, count, *after]
    if len(index_shape) != 1:
        dy = g.op("Reshape", dy, g.const(target(flat)), hint="dy")
    return {0: _added_rows(g, dy, flat, axis, places, shape)}


def _added_rows(g: GraphBuilder, dy: str, flat: Sequence[int], axis: int, places: str, shape: Sequence[int]) -> str:
    """Emit dX of ``shape`` with dX[.., places[j], ..] += dY[.., j, ..]; dY has the shape ``flat``.

    By ScatterElements: onnxruntime's ScatterND loses additions to one place when it runs on several threads (measured
    with 1.31: 3274 instead of 5000 ones).
    """
    column = [-1 if i == axis else 1 for i in range(len(shape))]
    places = g.op("Reshape", places, g.const(column), hint="places")
    if any(extent <= 0 for extent in shape):
        places = g.op("Mul", places, batch_ones(g, dy, flat, to=_INT64), hint="places")
    places = expand(g, places, [1 if i == axis else extent for i, extent in enumerate(flat)])
    start = zeros(g, shape, dy, flat)
    return str(g.op("ScatterElements", start, places, dy, axis=axis, reduction="add", hint="dx"))


# GatherElements, GatherND: dX = dY, added into zeros at the same places
def _gather_elements(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    return _scattered_elements(ctx, node, dy, node.inputs[1]) if 0 in wrt else {}


def _scattered_elements(ctx: Context, node: Node, dy: str, indices: str) -> Mapping[int, str]:
    g, shapes = ctx.g, ctx.graph.shapes
    axis = int(node.attributes.get("axis", -1 if node.op == "TopK" else 0)) % len(shapes[node.inputs[0]])
    refuse_batch(node, shapes[node.inputs[0]], axis, "picks from")
    start = zeros(g, shapes[node.inputs[0]], dy, shapes[node.outputs[0]])
    places = ctx.value(indices)
    return {0: g.op("ScatterElements", start, places, dy, axis=axis, reduction="add", hint="dx")}


def _gather_nd(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    if 0 not in wrt:
        return {}
    g, shapes = ctx.g, ctx.graph.shapes
    depth = shapes[node.inputs[1]][-1]
    if node.attributes.get("batch_dims", 0) or min(shapes[node.inputs[0]][:depth]) <= 0:
        raise UnsupportedOperatorError(
            f"GatherND '{node.name}': only indices within a sample have a backward rule, without batch_dims; use "
            "GatherElements (torch.gather)"
        )
    # The indexed axes count as one, and an element's place on it is Σ index·stride.
    indexed, rest = shapes[node.inputs[0]][:depth], shapes[node.inputs[0]][depth:]
    strides = [math.prod(indexed[i + 1 :]) for i in range(depth)]
    place = g.op(
        "Mod", ctx.value(node.inputs[1]), g.const(list(indexed)), hint="place"
    )  # negative ones count backwards
    place = g.op("ReduceSum", g.op("Mul", place, g.const(strides)), g.const([-1]), keepdims=0, hint="place")
    flat = [math.prod(shapes[node.inputs[1]][:-1]), *rest]
    rows = g.op("Reshape", dy, g.const(target(flat)), hint="rows")
    dx = _added_rows(g, rows, flat, 0, place, [math.prod(indexed), *rest])
    return {0: g.op("Reshape", dx, g.const(target(shapes[node.inputs[0]])), hint="dx")}


# TopK: the values' gradient goes to where they were found
def _top_k_wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    return [Want(node.outputs[1], Use.VALUE)]


def _top_k(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    return _scattered_elements(ctx, node, dy, node.outputs[1])


# ScatterElements, ScatterND: dupdates = dY at the places; ddata = dY, with zeros at the places unless they were added.
# Without a reduction the places must differ, as the ONNX standard asks.
def _adds(node: Node) -> bool:
    reduction = str(node.attributes.get("reduction", "none"))
    if reduction not in ("none", "add"):
        raise UnsupportedOperatorError(f"{node.op} '{node.name}': reduction '{reduction}' has no backward rule")
    return reduction == "add"


def _scatter(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, places, gradients = ctx.g, ctx.value(node.inputs[1]), {}
    elements = node.op == "ScatterElements"
    attributes: dict[str, Any] = {"axis": int(node.attributes.get("axis", 0))} if elements else {}
    gather = "GatherElements" if elements else "GatherND"
    adds = _adds(node)
    picked = g.op(gather, dy, places, hint="dupdates", **attributes) if 2 in wrt or not adds else ""
    if 2 in wrt:
        gradients[2] = picked
    if 0 in wrt:
        gradients[0] = dy
        if not adds:
            nothing_there = g.op("Mul", picked, g.const(0.0), hint="zeros")
            gradients[0] = g.op(node.op, dy, places, nothing_there, hint="ddata", **attributes)
    return gradients


RULES = {
    "Slice": Rule(nothing, _slice, "nothing"),
    "Gather": Rule(_indices_wants, _gather, "the indices"),
    "GatherElements": Rule(_indices_wants, _gather_elements, "the indices"),
    "GatherND": Rule(_indices_wants, _gather_nd, "the indices"),
    "TopK": Rule(_top_k_wants, _top_k, "the indices"),
    "ScatterElements": Rule(_indices_wants, _scatter, "the indices"),
    "ScatterND": Rule(_indices_wants, _scatter, "the indices"),
}
