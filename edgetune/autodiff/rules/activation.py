"""Reverse rules of activation functions: the derivative of the ONNX operator's own definition above each.

A piecewise linear one keeps a bit per element; a smooth one its input, or its output where the derivative is a formula
of that, because the next layer often keeps the output anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from edgetune.autodiff.builder import GraphBuilder
from edgetune.autodiff.graph import ForwardGraph, Node
from edgetune.autodiff.lowering import GELU_TANH, emit_gelu_argument
from edgetune.autodiff.rule import Context, Rule, Want, nothing, unbroadcast
from edgetune.codecs.base import Use
from edgetune.codecs.sign import POSITIVE, Interval
from edgetune.errors import UnsupportedOperatorError

_FLOAT = 1  # onnx.TensorProto.FLOAT
_ALPHA = {"Elu": 1.0, "Selu": 1.67326319217681884765625, "Celu": 1.0}  # default alpha, from the ONNX standard
_SELU_GAMMA = 1.05070102214813232421875


def masked(ctx: Context, mask: str, dy: str) -> str:
    """Emit dY where the mask holds, 0 elsewhere.

    A product, not Where: onnxruntime's Where makes two temporaries of the output's size, a product needs one factor.
    """
    factor = ctx.g.op("Cast", mask, to=_FLOAT, hint="factor")
    return str(ctx.g.op("Mul", dy, factor, hint="dx"))


# -- piecewise linear -------------------------------------------------------------------------------------------------


# Relu: dx = dy where y > 0
def _relu_wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    return [Want(node.outputs[0], Use.SIGN)]


def _relu(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    return {0: masked(ctx, ctx.mask(node.outputs[0], POSITIVE), dy)}


# Clip: dx = dy where low < y < high (zero at the bounds, as torch's hardtanh and relu6)
def _clip_interval(graph: ForwardGraph, node: Node) -> Interval:
    low, high = (_bound(graph, node, i, default) for i, default in ((1, -np.inf), (2, np.inf)))
    return Interval(low, high)


def _bound(graph: ForwardGraph, node: Node, index: int, default: float) -> float:
    name = node.input(index)
    if name and name not in graph.constants:
        raise UnsupportedOperatorError(
            f"Clip '{node.name}': its bound '{name}' is not a constant; use Max and Min (torch.maximum, torch.minimum)"
        )
    return float(graph.constants[name].item()) if name else default


def _clip_wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    interval = _clip_interval(graph, node)
    return [] if interval == Interval(-np.inf, np.inf) else [Want(node.outputs[0], Use.SIGN, interval=interval)]


def _clip(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    interval = _clip_interval(ctx.graph, node)
    if interval == Interval(-np.inf, np.inf):
        return {0: dy}
    return {0: masked(ctx, ctx.mask(node.outputs[0], interval), dy)}


# HardSigmoid: y = clip(alpha·x + beta, 0, 1), dx = alpha·dy where 0 < y < 1
_UNIT = Interval(0.0, 1.0)


def _hard_sigmoid_wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    return [Want(node.outputs[0], Use.SIGN, interval=_UNIT)]


def _hard_sigmoid(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    alpha = float(node.attributes.get("alpha", 0.2))
    kept = masked(ctx, ctx.mask(node.outputs[0], _UNIT), dy)
    return {0: ctx.g.op("Mul", kept, ctx.g.const(alpha), hint="dx")}


# LeakyRelu: dx = dy where x > 0, alpha·dy elsewhere
def _leaky_wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    return [Want(node.inputs[0], Use.SIGN)]


def _leaky(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, alpha = ctx.g, float(node.attributes.get("alpha", 0.01))
    factor = g.op("Cast", ctx.mask(node.inputs[0], POSITIVE), to=_FLOAT, hint="positive")
    slope = g.op("Add", g.op("Mul", factor, g.const(1.0 - alpha), hint="slope"), g.const(alpha), hint="slope")
    return {0: g.op("Mul", dy, slope, hint="dx")}


# PRelu: y = x where x > 0, slope·x elsewhere; dx = dy or slope·dy, dslope = Σ dy·min(x, 0)
def _prelu_wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    wants = [Want(node.inputs[0], Use.VALUE)] if 1 in wrt else []
    return [*wants, Want(node.inputs[0], Use.SIGN), Want(node.inputs[1], Use.VALUE)] if 0 in wrt else wants


def _prelu(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, gradients = ctx.g, {}
    if 0 in wrt:
        positive = g.op("Cast", ctx.mask(node.inputs[0], POSITIVE), to=_FLOAT, hint="positive")
        below = g.op("Mul", g.op("Sub", g.const(1.0), positive, hint="below"), ctx.value(node.inputs[1]), hint="below")
        gradients[0] = g.op("Mul", dy, g.op("Add", positive, below, hint="slope"), hint="dx")
    if 1 in wrt:
        below = g.op("Min", ctx.value(node.inputs[0]), g.const(0.0), hint="below")
        gradients[1] = unbroadcast(ctx, g.op("Mul", dy, below, hint="dslope"), node.inputs[1], node.outputs[0])
    return gradients


# ThresholdedRelu: y = x where x > alpha, else 0; dx = dy where x > alpha
def _threshold(node: Node) -> Interval:
    return Interval(float(node.attributes.get("alpha", 1.0)), math.inf)


def _thresholded_wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    return [Want(node.inputs[0], Use.SIGN, interval=_threshold(node))]


def _thresholded(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    return {0: masked(ctx, ctx.mask(node.inputs[0], _threshold(node)), dy)}


# Shrink: y = x ± bias where |x| > lambd, else 0; dx = dy there
def _shrink_intervals(node: Node) -> tuple[Interval, Interval]:
    bound = float(node.attributes.get("lambd", 0.5))
    return Interval(bound, math.inf), Interval(-math.inf, -bound)


def _shrink_wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    return [Want(node.inputs[0], Use.SIGN, interval=interval) for interval in _shrink_intervals(node)]


def _shrink(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    outside = [ctx.mask(node.inputs[0], interval) for interval in _shrink_intervals(node)]
    return {0: masked(ctx, ctx.g.op("Or", *outside, hint="outside"), dy)}


# -- smooth -----------------------------------------------------------------------------------------------------------

Slope = Callable[[GraphBuilder, str, Node], str]


def smooth(slope: Slope, of_output: bool) -> Rule:
    """Return the rule dx = dy·slope(t), where t is the operator's output or its input; it is kept."""

    def kept(node: Node) -> str:
        return node.outputs[0] if of_output else node.inputs[0]

    def wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
        return [Want(kept(node), Use.VALUE)]

    def backward(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
        return {0: ctx.g.op("Mul", dy, slope(ctx.g, ctx.value(kept(node)), node), hint="dx")}

    return Rule(wants, backward, "its output" if of_output else "its input", broadcasts=True)


# Sigmoid: y·(1 - y)
def _sigmoid(g: GraphBuilder, y: str, node: Node) -> str:
    return str(g.op("Mul", g.op("Sub", g.const(1.0), y, hint="slope"), y, hint="slope"))


# Tanh: 1 - y²
def _tanh(g: GraphBuilder, y: str, node: Node) -> str:
    return str(g.op("Sub", g.const(1.0), g.op("Mul", y, y, hint="slope"), hint="slope"))


# Erf: 2/√π·exp(-x²)
def _erf(g: GraphBuilder, x: str, node: Node) -> str:
    bell = g.op("Exp", g.op("Neg", g.op("Mul", x, x, hint="square"), hint="square"), hint="bell")
    return str(g.op("Mul", bell, g.const(2.0 / math.sqrt(math.pi)), hint="slope"))


# Elu, Selu, Celu: y = a·(exp(x) - 1) below zero, so the slope there is y + a; Selu: γ times both; Celu: y/a + 1.
# Above zero it is 1 (Selu: γ). For a ≥ 0 the sign of y is that of x.
def _elu(g: GraphBuilder, y: str, node: Node) -> str:
    alpha = float(node.attributes.get("alpha", _ALPHA[node.op]))
    if alpha < 0.0:
        raise UnsupportedOperatorError(f"{node.op} '{node.name}' has alpha {alpha:g}; its rule needs alpha >= 0")
    above = float(node.attributes.get("gamma", _SELU_GAMMA)) if node.op == "Selu" else 1.0
    at_zero = 1.0 if node.op == "Celu" else above * alpha
    below = g.op("Min", y, g.const(0.0), hint="below")
    if node.op == "Celu":
        below = g.op("Mul", below, g.const(1.0 / alpha), hint="below")
    positive = g.op("Cast", g.op("Greater", y, g.const(0.0), hint="positive"), to=_FLOAT, hint="positive")
    jump = g.op("Mul", positive, g.const(above - at_zero), hint="jump")
    return str(g.op("Add", g.op("Add", below, g.const(at_zero), hint="slope"), jump, hint="slope"))


# Softplus: y = log(1 + exp(x)), slope sigmoid(x)
def _softplus(g: GraphBuilder, x: str, node: Node) -> str:
    return str(g.op("Sigmoid", x, hint="slope"))


# Softsign: y = x/(1 + |x|), slope (1 - |y|)²
def _softsign(g: GraphBuilder, y: str, node: Node) -> str:
    root = g.op("Sub", g.const(1.0), g.op("Abs", y, hint="size"), hint="root")
    return str(g.op("Mul", root, root, hint="slope"))


# Mish: y = x·t with t = tanh(softplus(x)); slope t + x·(1 - t²)·sigmoid(x)
def _mish(g: GraphBuilder, x: str, node: Node) -> str:
    gate = g.op("Tanh", g.op("Softplus", x, hint="soft"), hint="gate")
    bend = g.op("Mul", _tanh(g, gate, node), g.op("Sigmoid", x, hint="rise"), hint="bend")
    return str(g.op("Add", gate, g.op("Mul", bend, x, hint="bend"), hint="slope"))


# HardSwish: y = x·clip(x/6 + 1/2, 0, 1); slope x/3 + 1/2 inside ]-3, 3[, 0 below, 1 above.
# The function is not monotonic below zero, so the sign of y does not tell the branch: x itself is kept.
def _hard_swish(g: GraphBuilder, x: str, node: Node) -> str:
    slope = g.op("Add", g.op("Mul", x, g.const(1.0 / 3.0), hint="slope"), g.const(0.5), hint="slope")
    # x/3 + 1/2 replaced by the slopes outside, by way of two masks
    above = g.op("GreaterOrEqual", x, g.const(3.0), hint="above")
    slope = g.op("Where", above, g.const(1.0), slope, hint="slope")
    below = g.op("LessOrEqual", x, g.const(-3.0), hint="below")
    return str(g.op("Where", below, g.const(0.0), slope, hint="slope"))


# Gelu and Swish keep x alone. Below, every tensor of x's size counts: dy and three more are alive at most if this rule
# is the last reader of x, because x is read first and nothing is held that the next node does not need.


# Swish: y = x·σ(αx). With n = -αx and c = σ(n) = 1 - σ(αx): slope σ(αx)·(1 + αx·c) = (1 - c)·(1 - n·c)
def _swish(g: GraphBuilder, x: str, node: Node) -> str:
    alpha = float(node.attributes["alpha"])
    n = g.op("Neg", x, hint="n") if alpha == 1.0 else g.op("Mul", x, g.const(-alpha), hint="n")
    c = g.op("Sigmoid", n, hint="c")
    bend = g.op("Sub", g.const(1.0), g.op("Mul", n, c, hint="bend"), hint="bend")
    return str(g.op("Mul", bend, g.op("Sub", g.const(1.0), c, hint="gate"), hint="slope"))


# Gelu: y = x·Φ(x); slope Φ(x) + x·φ(x), where φ(x) = exp(-x²/2)/√(2π) and Φ(x) = (1 + erf(x/√2))/2
def _gelu(g: GraphBuilder, x: str, node: Node) -> str:
    if node.attributes["approximate"] == "tanh":
        return _gelu_tanh(g, x)
    square = g.op("Mul", g.op("Mul", x, x, hint="square"), g.const(-0.5), hint="square")
    bell = g.op("Mul", g.op("Exp", square, hint="bell"), g.const(1.0 / math.sqrt(2.0 * math.pi)), hint="bell")
    bell = g.op("Mul", bell, x, hint="bell")
    share = g.op("Erf", g.op("Mul", x, g.const(math.sqrt(0.5)), hint="share"), hint="share")
    share = g.op("Mul", g.op("Add", share, g.const(1.0), hint="share"), g.const(0.5), hint="share")
    return str(g.op("Add", bell, share, hint="slope"))


# by tanh: (1 + tanh(u))/2 = σ(2u), so y = x·σ(2u) with 2u = a·x + b·x³. With n = -2u and c = σ(n): slope
# (1 - c)·(1 + c·x·(2u)'), where x·(2u)' = a·x + 3b·x³ = -3n - 2a·x
def _gelu_tanh(g: GraphBuilder, x: str) -> str:
    a, b = (2.0 * coefficient for coefficient in GELU_TANH)
    n = emit_gelu_argument(g, x, -a, -b)
    third = g.op("Add", g.op("Mul", x, g.const(2.0 * a / 3.0), hint="third"), n, hint="third")
    c = g.op("Sigmoid", n, hint="c")
    bend = g.op("Mul", g.op("Mul", third, c, hint="bend"), g.const(-3.0), hint="bend")
    bend = g.op("Add", bend, g.const(1.0), hint="bend")
    return str(g.op("Mul", bend, g.op("Sub", g.const(1.0), c, hint="gate"), hint="slope"))


def _identity(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    return {0: dy}


RULES = {
    "Relu": Rule(_relu_wants, _relu, "1 bit per element", broadcasts=True),
    "Clip": Rule(_clip_wants, _clip, "1 bit per element", broadcasts=True),
    "HardSigmoid": Rule(_hard_sigmoid_wants, _hard_sigmoid, "1 bit per element"),
    "LeakyRelu": Rule(_leaky_wants, _leaky, "1 bit per element"),
    "PRelu": Rule(_prelu_wants, _prelu, "1 bit per element (for the slope: its input)"),
    "ThresholdedRelu": Rule(_thresholded_wants, _thresholded, "1 bit per element"),
    "Shrink": Rule(_shrink_wants, _shrink, "2 bits per element"),
    "Sigmoid": smooth(_sigmoid, of_output=True),
    "Tanh": smooth(_tanh, of_output=True),
    "Erf": smooth(_erf, of_output=False),
    "Elu": smooth(_elu, of_output=True),
    "Selu": smooth(_elu, of_output=True),
    "Celu": smooth(_elu, of_output=True),
    "Softplus": smooth(_softplus, of_output=False),
    "Softsign": smooth(_softsign, of_output=True),
    "Mish": smooth(_mish, of_output=False),
    "HardSwish": smooth(_hard_swish, of_output=False),
    "Gelu": smooth(_gelu, of_output=False),
    "Swish": smooth(_swish, of_output=False),
    "Identity": Rule(nothing, _identity, "nothing"),
}
