"""Reverse rules of element-wise operators: formula above each, derivative of the ONNX operator's own definition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgetune.autodiff.graph import ForwardGraph, Node
from edgetune.autodiff.rule import Context, Rule, Want, nothing, unbroadcast
from edgetune.codecs.base import Use
from edgetune.codecs.sign import POSITIVE, Interval

_FLOAT = 1  # onnx.TensorProto.FLOAT


# Relu: dx = dy where y > 0
def _relu_wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    return [Want(node.outputs[0], Use.SIGN)]


def _relu(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    return {0: _masked(ctx, ctx.mask(node.outputs[0], POSITIVE), dy)}


# Clip: dx = dy where low < y < high (zero at the bounds, as torch's hardtanh and relu6)
def _clip_interval(graph: ForwardGraph, node: Node) -> Interval:
    low, high = (_scalar(graph, node.input(i), default) for i, default in ((1, -np.inf), (2, np.inf)))
    return Interval(low, high)


def _scalar(graph: ForwardGraph, name: str, default: float) -> float:
    return float(graph.constants[name]) if name else default


def _clip_wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    interval = _clip_interval(graph, node)
    return [] if interval == Interval(-np.inf, np.inf) else [Want(node.outputs[0], Use.SIGN, interval=interval)]


def _clip(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    interval = _clip_interval(ctx.graph, node)
    if interval == Interval(-np.inf, np.inf):
        return {0: dy}
    return {0: _masked(ctx, ctx.mask(node.outputs[0], interval), dy)}


# HardSigmoid: y = clip(alpha·x + beta, 0, 1), dx = alpha·dy where 0 < y < 1
_UNIT = Interval(0.0, 1.0)


def _hard_sigmoid_wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    return [Want(node.outputs[0], Use.SIGN, interval=_UNIT)]


def _hard_sigmoid(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    alpha = float(node.attributes.get("alpha", 0.2))
    masked = _masked(ctx, ctx.mask(node.outputs[0], _UNIT), dy)
    return {0: ctx.g.op("Mul", masked, ctx.g.const(alpha), hint="dx")}


# HardSwish: y = x·clip(x/6 + 1/2, 0, 1); dy/dx = clip(x/6 + 1/2, 0, 1) + x/6 inside ]-3, 3[, 0 below, 1 above.
# The function is not monotonic below zero, so the sign of y does not tell the branch: x itself is kept.
def _hard_swish_wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    return [Want(node.inputs[0], Use.VALUE)]


def _hard_swish(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, x = ctx.g, ctx.value(node.inputs[0])
    # x/3 + 1/2 clipped to the slopes outside: 0 for x <= -3 and 1 for x >= 3 by way of two masks.
    slope = g.op("Add", g.op("Mul", x, g.const(1.0 / 3.0), hint="slope"), g.const(0.5), hint="slope")
    above = g.op("GreaterOrEqual", x, g.const(3.0), hint="above")
    slope = g.op("Where", above, g.const(1.0), slope, hint="slope")
    below = g.op("LessOrEqual", x, g.const(-3.0), hint="below")
    slope = g.op("Where", below, g.const(0.0), slope, hint="slope")
    return {0: g.op("Mul", slope, dy, hint="dx")}


# Sigmoid: dx = dy·y·(1 - y)
def _sigmoid_wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    return [Want(node.outputs[0], Use.VALUE)]


def _sigmoid(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, y = ctx.g, ctx.value(node.outputs[0])
    slope = g.op("Mul", g.op("Sub", g.const(1.0), y, hint="slope"), y, hint="slope")
    return {0: g.op("Mul", slope, dy, hint="dx")}


# Add: da = dy, db = dy, each summed over what was broadcast
def _add(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    return {i: unbroadcast(ctx, dy, node.inputs[i], node.outputs[0]) for i in sorted(wrt)}


# Sub: da = dy, db = -dy
def _sub(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    gradients = _add(ctx, node, wrt, dy)
    return {i: ctx.g.op("Neg", d, hint="db") if i == 1 else d for i, d in gradients.items()}


# Mul: da = dy·b, db = dy·a
def _mul_wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    return [Want(node.inputs[1 - i], Use.VALUE) for i in sorted(wrt)]


def _mul(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    gradients = {}
    for i in sorted(wrt):
        product = ctx.g.op("Mul", dy, ctx.value(node.inputs[1 - i]), hint="dmul")
        gradients[i] = unbroadcast(ctx, product, node.inputs[i], node.outputs[0])
    return gradients


def _identity(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    return {0: dy}


def _masked(ctx: Context, mask: str, dy: str) -> str:
    """Emit dY where the mask holds, 0 elsewhere.

    A product, not Where: onnxruntime's Where makes two temporaries of the output's size, a product needs one factor.
    """
    factor = ctx.g.op("Cast", mask, to=_FLOAT, hint="factor")
    return str(ctx.g.op("Mul", dy, factor, hint="dx"))


RULES = {
    "Relu": Rule(_relu_wants, _relu, "1 bit per element"),
    "Clip": Rule(_clip_wants, _clip, "1 bit per element"),
    "HardSigmoid": Rule(_hard_sigmoid_wants, _hard_sigmoid, "1 bit per element"),
    "HardSwish": Rule(_hard_swish_wants, _hard_swish, "its input"),
    "Sigmoid": Rule(_sigmoid_wants, _sigmoid, "its output"),
    "Add": Rule(nothing, _add, "nothing"),
    "Sub": Rule(nothing, _sub, "nothing"),
    "Mul": Rule(_mul_wants, _mul, "the other factor"),
    "Identity": Rule(nothing, _identity, "nothing"),
}
