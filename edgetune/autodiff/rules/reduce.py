"""Reverse rules of reductions over any axes, the batch included.

Over the batch, whose extent is unknown at export, a tiny tensor of ones with the batch axis is kept: it counts the
samples, and it spreads a gradient over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from edgetune.autodiff.graph import ForwardGraph, Node
from edgetune.autodiff.lowering import batch_ones, emit_node
from edgetune.autodiff.rule import Context, Rule, Want, nothing
from edgetune.autodiff.rules.arithmetic import NEGATIVE, sign
from edgetune.autodiff.rules.axes import integers
from edgetune.codecs.base import Use

_FLOAT = 1  # onnx.TensorProto.FLOAT


def reduced_axes(graph: ForwardGraph, node: Node) -> list[int]:
    """Return the axes that a Reduce* node runs over; none given: all, or none with ``noop_with_empty_axes``."""
    rank = len(graph.shapes[node.inputs[0]])
    given = integers(graph, node, 1, "axes")
    if not given and node.attributes.get("noop_with_empty_axes", 0):
        return []
    return sorted(axis % rank for axis in given) if given else list(range(rank))


def _over_batch(graph: ForwardGraph, node: Node) -> bool:
    shape = graph.shapes[node.inputs[0]]
    return any(shape[axis] <= 0 for axis in reduced_axes(graph, node))


def _forward(ctx: Context, node: Node) -> tuple[str, ...]:
    emit_node(ctx.g, node, ctx.graph)
    if not _over_batch(ctx.graph, node):
        return ()
    return (batch_ones(ctx.g, node.inputs[0], ctx.graph.shapes[node.inputs[0]]),)


def _aligned(ctx: Context, node: Node, reduced: str) -> str:
    """Emit a tensor shaped like the result with the reduced axes put back."""
    axes = reduced_axes(ctx.graph, node)
    if node.attributes.get("keepdims", 1) or not axes:
        return reduced
    return str(ctx.g.op("Unsqueeze", reduced, ctx.g.const(axes), hint="aligned"))


def _spread(ctx: Context, node: Node, dy: str) -> str:
    """Emit dY, repeated over the reduced axes."""
    shape, axes = ctx.graph.shapes[node.inputs[0]], reduced_axes(ctx.graph, node)
    spread = _aligned(ctx, node, dy)
    if ctx.kept(node):
        spread = ctx.g.op("Mul", spread, ctx.kept(node)[0], hint="over_batch")
    return ctx.spread(spread, shape) if any(shape[axis] > 1 for axis in axes) else spread


# ReduceSum: dX = dY
def _sum(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    return {0: _spread(ctx, node, dy)}


# ReduceMean: dX = dY/n
def _mean(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, shape = ctx.g, ctx.graph.shapes[node.inputs[0]]
    count = math.prod(max(shape[axis], 1) for axis in reduced_axes(ctx.graph, node))
    share = g.op("Mul", dy, g.const(1.0 / count), hint="share")
    if ctx.kept(node):
        share = g.op("Div", share, g.op("ReduceSum", ctx.kept(node)[0], keepdims=0, hint="samples"), hint="share")
    return {0: _spread(ctx, node, share)}


# ReduceLogSum: y = log Σ x, dX = dY·exp(-y)
def _log_sum(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g = ctx.g
    share = g.op("Exp", g.op("Neg", ctx.value(node.outputs[0]), hint="minus"), hint="share")
    return {0: _spread(ctx, node, g.op("Mul", dy, share, hint="share"))}


# The others are products with something of the input's shape, so dY broadcasts by itself.
Factor = Callable[[Context, Node, str], str]


def _product(factor: Factor, wants: Callable[[Node], Sequence[Want]], doc: str) -> Rule:
    """Return the rule dX = factor·dY."""

    def backward(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
        return {0: ctx.g.op("Mul", factor(ctx, node, node.inputs[0]), _aligned(ctx, node, dy), hint="dx")}

    return Rule(lambda graph, node, wrt: wants(node), backward, doc)


def _input(node: Node) -> Sequence[Want]:
    return [Want(node.inputs[0], Use.VALUE)]


def _both(node: Node) -> Sequence[Want]:
    return [Want(node.inputs[0], Use.VALUE), Want(node.outputs[0], Use.VALUE)]


def _signs(node: Node) -> Sequence[Want]:
    return [Want(node.inputs[0], Use.SIGN), Want(node.inputs[0], Use.SIGN, interval=NEGATIVE)]


def _result(node: Node) -> Sequence[Want]:
    return [Want(node.outputs[0], Use.VALUE)]


# ReduceMax, ReduceMin: dX = dY where x is the extreme, shared evenly among equals (as torch.amax)
def _extreme(ctx: Context, node: Node, x: str) -> str:
    g = ctx.g
    equal = g.op("Equal", ctx.value(x), _aligned(ctx, node, ctx.value(node.outputs[0])), hint="equal")
    factor = g.op("Cast", equal, to=_FLOAT, hint="factor")
    axes = reduced_axes(ctx.graph, node)
    if not axes:
        return str(factor)
    return str(g.op("Div", factor, g.op("ReduceSum", factor, g.const(axes), keepdims=1, hint="count"), hint="share"))


# ReduceL1: dX = sign(x)·dY
def _l1(ctx: Context, node: Node, x: str) -> str:
    return sign(ctx, x)


# ReduceL2: dX = x/y·dY, 0 where y = 0 (as torch)
def _l2(ctx: Context, node: Node, x: str) -> str:
    g, norm = ctx.g, _aligned(ctx, node, ctx.value(node.outputs[0]))
    zero = g.op("Cast", g.op("Equal", norm, g.const(0.0), hint="zero"), to=_FLOAT, hint="zero")
    return str(g.op("Div", ctx.value(x), g.op("Add", norm, zero, hint="norm"), hint="direction"))


# ReduceSumSquare: dX = 2x·dY
def _sum_square(ctx: Context, node: Node, x: str) -> str:
    return str(ctx.g.op("Mul", ctx.value(x), ctx.g.const(2.0), hint="slope"))


# ReduceLogSumExp: dX = exp(x - y)·dY
def _log_sum_exp(ctx: Context, node: Node, x: str) -> str:
    g, y = ctx.g, _aligned(ctx, node, ctx.value(node.outputs[0]))
    return str(g.op("Exp", g.op("Sub", ctx.value(x), y, hint="log_p"), hint="p"))


RULES = {
    "ReduceSum": Rule(nothing, _sum, "nothing", forward=_forward),
    "ReduceMean": Rule(nothing, _mean, "nothing", forward=_forward),
    "ReduceLogSum": Rule(lambda graph, node, wrt: _result(node), _log_sum, "its output", forward=_forward),
    "ReduceMax": _product(_extreme, _both, "its input and output"),
    "ReduceMin": _product(_extreme, _both, "its input and output"),
    "ReduceL1": _product(_l1, _signs, "2 bits per element"),
    "ReduceL2": _product(_l2, _both, "its input and output"),
    "ReduceSumSquare": _product(_sum_square, _input, "its input"),
    "ReduceLogSumExp": _product(_log_sum_exp, _both, "its input and output"),
}
