"""Helpers of the rules: moving along one axis while the batch, of unknown extent, may be any other one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from edgetune.autodiff.builder import GraphBuilder
from edgetune.autodiff.graph import ForwardGraph, Node
from edgetune.codecs.base import Array
from edgetune.errors import UnsupportedOperatorError

ROUNDS = 4  # so many gathers at most, before one product with a matrix of zeros and ones is used


def constant(graph: ForwardGraph, node: Node, index: int) -> Array:
    """Return the value of an input that must be a constant.

    Raises:
        UnsupportedOperatorError: it is computed from the data.
    """
    name = node.inputs[index]
    if name not in graph.constants:
        raise UnsupportedOperatorError(
            f"{node.op} '{node.name}': its input {index} ('{name}') depends on the data; the backward rule needs a "
            "constant"
        )
    return graph.constants[name]


def integers(graph: ForwardGraph, node: Node, index: int, attribute: str = "") -> list[int] | None:
    """Return constant integers given as input ``index`` or, in older models, as ``attribute``; None if neither is."""
    if node.input(index):
        return [int(i) for i in constant(graph, node, index).reshape(-1)]
    given = node.attributes.get(attribute)
    return None if given is None else [int(i) for i in given]


def batch_axis(shape: Sequence[int]) -> int | None:
    """Return the axis that grows with the batch, None if there is none."""
    return next((i for i, extent in enumerate(shape) if extent <= 0), None)


def target(shape: Sequence[int]) -> list[int]:
    """Return what a Reshape to ``shape`` takes: -1 for the axis that grows with the batch."""
    return [-1 if extent <= 0 else extent for extent in shape]


def refuse_batch(node: Node, shape: Sequence[int], axis: int, what: str) -> None:
    """Raise UnsupportedOperatorError if ``axis`` of ``shape`` is the batch."""
    if shape[axis] <= 0:
        raise UnsupportedOperatorError(f"{node.op} '{node.name}' {what} the batch; samples must stay independent")


def expand(g: GraphBuilder, tensor: str, shape: Sequence[int]) -> str:
    """Emit ``tensor``, which has its batch axis already, broadcast to ``shape``."""
    return str(g.op("Expand", tensor, g.const([max(extent, 1) for extent in shape]), hint="expanded"))


def zeros(g: GraphBuilder, shape: Sequence[int], source: str, source_shape: Sequence[int]) -> str:
    """Emit zeros of ``shape``; their batch, known only at run time, is that of ``source``."""
    place, found = batch_axis(shape), batch_axis(source_shape)
    if place is None:
        return expand(g, g.const(0.0), shape)
    if found is None or shape[place] != source_shape[found]:
        raise ValueError(f"no batch axis of {source_shape} fits {shape}")
    axes = [i for i, extent in enumerate(source_shape) if extent > 1]
    if axes:
        ends = g.const([1] * len(axes))
        source = g.op("Slice", source, g.const([0] * len(axes)), ends, g.const(axes), hint="thin")
    if found != place or len(shape) != len(source_shape):
        source = g.op("Reshape", source, g.const([-1 if i == place else 1 for i in range(len(shape))]), hint="thin")
    return expand(g, g.op("Mul", source, g.const(0.0), hint="zero"), shape)


def multiply_along(g: GraphBuilder, x: str, shape: Sequence[int], axis: int, matrix: Array) -> str:
    """Emit Y[.., i, ..] = Σ_j M[i, j]·X[.., j, ..] with j on ``axis`` of ``x``, whose shape is ``shape``."""
    rows = [*shape[:axis], matrix.shape[0], *shape[axis + 1 :]]
    if axis == len(shape) - 1:
        return str(g.op("MatMul", x, g.const(np.ascontiguousarray(matrix.T)), hint="product"))
    if axis < len(shape) - 2:
        before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        planes = [before if before > 0 else -1, shape[axis], after if after > 0 else -1]
        x = g.op("Reshape", x, g.const(planes), hint="planes")
        x = g.op("MatMul", g.const(matrix), x, hint="product")
        return str(g.op("Reshape", x, g.const(target(rows)), hint="product"))
    return str(g.op("MatMul", g.const(matrix), x, hint="product"))


def scatter_along(
    g: GraphBuilder, dy: str, shape: Sequence[int], axis: int, indices: Sequence[int], extent: int
) -> str:
    """Emit the adjoint of picking ``indices`` on one axis: dX[.., j, ..] = Σ_{i: indices[i] = j} dY[.., i, ..].

    ``shape`` is that of dY, whose ``axis`` has len(indices) elements; dX has ``extent`` there. Gathers from dY with a
    row of zeros behind it, one per time that an element was picked: no runtime needs a scatter for that.
    """
    lists: dict[int, list[int]] = {}
    for i, j in enumerate(indices):
        lists.setdefault(j, []).append(i)
    picked = [lists.get(k, []) for k in range(extent)]
    rounds = max((len(places) for places in picked), default=0)
    if rounds > ROUNDS:
        matrix = np.zeros((extent, len(indices)), np.float32)
        matrix[list(indices), np.arange(len(indices))] = 1.0
        return multiply_along(g, dy, shape, axis, matrix)
    if any(len(places) < rounds for places in picked):
        pads = np.zeros((2, len(shape)), np.int64)
        pads[1, axis] = 1
        dy = g.op("Pad", dy, g.const(pads.reshape(-1)), hint="with_zeros")
    total = ""
    for k in range(rounds):
        places = [p[k] if k < len(p) else len(indices) for p in picked]
        term = g.op("Gather", dy, g.const(places), axis=axis, hint="back")
        total = g.op("Add", total, term, hint="back") if total else term
    return str(total)
