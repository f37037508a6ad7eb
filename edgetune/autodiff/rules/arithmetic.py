"""Reverse rules of arithmetic, element by element with broadcasting, and of operators without a gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from edgetune.autodiff.builder import GraphBuilder
from edgetune.autodiff.graph import ForwardGraph, Node
from edgetune.autodiff.rule import FLOATS, Context, Rule, Want, nothing, unbroadcast
from edgetune.autodiff.rules.activation import masked, smooth
from edgetune.codecs.base import Use
from edgetune.codecs.sign import POSITIVE, Interval
from edgetune.errors import UnsupportedOperatorError

_FLOAT = 1  # onnx.TensorProto.FLOAT
NEGATIVE = Interval(-math.inf, 0.0)


# Add, Sum: each d = dy, summed over what was broadcast
def _add(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    return {i: unbroadcast(ctx, dy, node.inputs[i], node.outputs[0]) for i in sorted(wrt)}


# Mean of n tensors: each d = dy/n
def _mean(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    return _add(ctx, node, wrt, ctx.g.op("Mul", dy, ctx.g.const(1.0 / len(node.inputs)), hint="share"))


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


# Div: da = dy/b, db = -dy·y/b
def _div_wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    return [Want(node.inputs[1], Use.VALUE), *([Want(node.outputs[0], Use.VALUE)] if 1 in wrt else [])]


def _div(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, gradients = ctx.g, {}
    share = g.op("Div", dy, ctx.value(node.inputs[1]), hint="share")
    if 0 in wrt:
        gradients[0] = unbroadcast(ctx, share, node.inputs[0], node.outputs[0])
    if 1 in wrt:
        product = g.op("Mul", share, ctx.value(node.outputs[0]), hint="ddiv")
        gradients[1] = g.op("Neg", unbroadcast(ctx, product, node.inputs[1], node.outputs[0]), hint="db")
    return gradients


# Pow: dx = dy·e·x^(e - 1); de = Σ dy·y·log x, 0 where x ≤ 0 (as torch at x = 0; below, log x is not defined)
def _exponent(graph: ForwardGraph, node: Node) -> float | None:
    """Return the exponent where it is one constant number."""
    value = graph.constants.get(node.inputs[1])
    return float(value.item()) if value is not None and value.size == 1 else None


def _pow_wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    base, exponent = node.inputs
    if _exponent(graph, node) in (0.0, 1.0):
        return []
    wants = [Want(base, Use.VALUE)]
    wants += [Want(exponent, Use.VALUE)] if 0 in wrt else []
    return wants + ([Want(node.outputs[0], Use.VALUE)] if 1 in wrt else [])


def _pow(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, (base, exponent) = ctx.g, node.inputs
    known, gradients = _exponent(ctx.graph, node), {}
    if 0 in wrt and known == 0.0:
        gradients[0] = g.op("Mul", dy, g.const(0.0), hint="dx")
    elif 0 in wrt and known is not None:
        slope = dy
        if known != 1.0:
            x = ctx.value(base)
            power = x if known == 2.0 else g.op("Pow", x, g.const(known - 1.0), hint="power")
            slope = g.op("Mul", g.op("Mul", dy, power, hint="slope"), g.const(known), hint="dx")
        gradients[0] = unbroadcast(ctx, slope, base, node.outputs[0])
    elif 0 in wrt:
        e = _float_exponent(ctx, exponent)
        # where e = 0 the slope is 0, though 0 to the power of -1 is infinite
        constant = g.op("Equal", e, g.const(0.0), hint="constant")
        less = g.op("Where", constant, g.const(0.0), g.op("Sub", e, g.const(1.0)), hint="less")
        power = g.op("Mul", e, g.op("Pow", ctx.value(base), less, hint="power"), hint="slope")
        gradients[0] = unbroadcast(ctx, g.op("Mul", dy, power, hint="dx"), base, node.outputs[0])
    if 1 in wrt:
        x = ctx.value(base)
        positive = g.op("Greater", x, g.const(0.0), hint="positive")
        log = g.op("Log", g.op("Where", positive, x, g.const(1.0), hint="safe"), hint="log")
        slope = g.op("Mul", ctx.value(node.outputs[0]), log, hint="slope")
        gradients[1] = unbroadcast(ctx, g.op("Mul", dy, slope, hint="de"), exponent, node.outputs[0])
    return gradients


def _float_exponent(ctx: Context, exponent: str) -> str:
    """Emit the exponent as floats; it may be integers."""
    if exponent in ctx.graph.constants:
        return ctx.g.const(ctx.graph.constants[exponent].astype(np.float32))
    integer = ctx.graph.dtypes.get(exponent, _FLOAT) not in FLOATS
    value = ctx.value(exponent)
    return str(ctx.g.op("Cast", value, to=_FLOAT, hint="exponent")) if integer else value


# Max, Min: dy to the operands that equal y, shared evenly where several do (as torch.maximum and torch.minimum).
# Beside one constant number, only on which side of it y lies: zero at a tie, as Clip.
def _bound(graph: ForwardGraph, node: Node) -> Interval | None:
    fixed = [name for name in node.inputs if name in graph.constants and graph.constants[name].size == 1]
    if len(node.inputs) != 2 or len(fixed) != 1:
        return None
    bound = float(graph.constants[fixed[0]].item())
    return Interval(bound, math.inf) if node.op == "Max" else Interval(-math.inf, bound)


def _extreme_wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    interval = _bound(graph, node)
    if interval is not None:
        return [Want(node.outputs[0], Use.SIGN, interval=interval)]
    return [Want(name, Use.VALUE) for name in [*node.inputs, node.outputs[0]]] if len(node.inputs) > 1 else []


def _extreme(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, y = ctx.g, node.outputs[0]
    interval = _bound(ctx.graph, node)
    if interval is not None:
        dy = masked(ctx, ctx.mask(y, interval), dy)
    if interval is not None or len(node.inputs) == 1:
        return {i: unbroadcast(ctx, dy, node.inputs[i], y) for i in sorted(wrt)}
    equal = [g.op("Equal", ctx.value(name), ctx.value(y), hint="equal") for name in node.inputs]
    factors = [g.op("Cast", mask, to=_FLOAT, hint="factor") for mask in equal]
    share = g.op("Div", dy, g.op("Sum", *factors, hint="count"), hint="share")
    return {
        i: unbroadcast(ctx, g.op("Mul", share, factors[i], hint="dx"), node.inputs[i], y) for i in sorted(wrt)
    }  # fmt: skip


# Where: da = dy where the condition holds, db = dy elsewhere
def _where_wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    return [Want(node.inputs[0], Use.VALUE)]


def _where(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, condition, gradients = ctx.g, ctx.value(node.inputs[0]), {}
    for i in sorted(wrt):
        mask = condition if i == 1 else g.op("Not", condition, hint="otherwise")
        gradients[i] = unbroadcast(ctx, masked(ctx, mask, dy), node.inputs[i], node.outputs[0])
    return gradients


# Abs: dx = dy·sign(x), 0 at 0; two bits per element
def _abs_wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    return [Want(node.inputs[0], Use.SIGN), Want(node.inputs[0], Use.SIGN, interval=NEGATIVE)]


def sign(ctx: Context, tensor: str) -> str:
    """Emit 1, 0 or -1 for every element of a tensor that was wanted for both signs."""
    positive, negative = (
        ctx.g.op("Cast", ctx.mask(tensor, interval), to=_FLOAT, hint="side") for interval in (POSITIVE, NEGATIVE)
    )
    return str(ctx.g.op("Sub", positive, negative, hint="sign"))


def _abs(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    return {0: ctx.g.op("Mul", dy, sign(ctx, node.inputs[0]), hint="dx")}


def _neg(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    return {0: ctx.g.op("Neg", dy, hint="dx")}


# Sqrt: 1/(2y)
def _sqrt(g: GraphBuilder, y: str, node: Node) -> str:
    return str(g.op("Div", g.const(0.5), y, hint="slope"))


# Reciprocal: -y²
def _reciprocal(g: GraphBuilder, y: str, node: Node) -> str:
    return str(g.op("Neg", g.op("Mul", y, y, hint="slope"), hint="slope"))


# Exp: y
def _exp(g: GraphBuilder, y: str, node: Node) -> str:
    return y


# Log: 1/x
def _log(g: GraphBuilder, x: str, node: Node) -> str:
    return str(g.op("Reciprocal", x, hint="slope"))


# Sin: cos x
def _sin(g: GraphBuilder, x: str, node: Node) -> str:
    return str(g.op("Cos", x, hint="slope"))


# Cos: -sin x
def _cos(g: GraphBuilder, x: str, node: Node) -> str:
    return str(g.op("Neg", g.op("Sin", x, hint="slope"), hint="slope"))


# Atan: 1/(1 + x²)
def _atan(g: GraphBuilder, x: str, node: Node) -> str:
    squared = g.op("Add", g.op("Mul", x, x, hint="square"), g.const(1.0), hint="square")
    return str(g.op("Reciprocal", squared, hint="slope"))


# Cast between floating-point types: dx = dy, cast back
def _cast(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    source = ctx.graph.dtypes.get(node.inputs[0], _FLOAT)
    if source == ctx.graph.dtypes.get(node.outputs[0], _FLOAT):
        return {0: dy}
    return {0: ctx.g.op("Cast", dy, to=source, hint="dx")}


# Mod of floats (fmod): da = dy; b must be constant
def _mod(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    if 1 in wrt:
        raise UnsupportedOperatorError(f"Mod '{node.name}': its divisor has no backward rule; make it a constant")
    return {0: unbroadcast(ctx, dy, node.inputs[0], node.outputs[0])}


# Step functions and comparisons have the gradient zero: no input gets one, and what is only used so is no obstacle.
def _none(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    return {}


WITHOUT_GRADIENT = (
    "Floor", "Ceil", "Round", "Sign", "Hardmax", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN",
    "IsInf", "And", "Or", "Xor", "Not", "ArgMax", "ArgMin", "Shape", "Size",
)  # fmt: skip

RULES = {
    "Add": Rule(nothing, _add, "nothing"),
    "Sum": Rule(nothing, _add, "nothing"),
    "Mean": Rule(nothing, _mean, "nothing"),
    "Sub": Rule(nothing, _sub, "nothing"),
    "Mul": Rule(_mul_wants, _mul, "the other factor"),
    "Div": Rule(_div_wants, _div, "the divisor (for its gradient: the output)"),
    "Pow": Rule(_pow_wants, _pow, "its input"),
    "Max": Rule(_extreme_wants, _extreme, "its inputs and output (beside a constant: 1 bit per element)"),
    "Min": Rule(_extreme_wants, _extreme, "its inputs and output (beside a constant: 1 bit per element)"),
    "Where": Rule(_where_wants, _where, "the condition"),
    "Abs": Rule(_abs_wants, _abs, "2 bits per element"),
    "Neg": Rule(nothing, _neg, "nothing"),
    "Sqrt": smooth(_sqrt, of_output=True),
    "Reciprocal": smooth(_reciprocal, of_output=True),
    "Exp": smooth(_exp, of_output=True),
    "Log": smooth(_log, of_output=False),
    "Sin": smooth(_sin, of_output=False),
    "Cos": smooth(_cos, of_output=False),
    "Atan": smooth(_atan, of_output=False),
    "Mod": Rule(nothing, _mod, "nothing"),
    "Cast": Rule(nothing, _cast, "nothing"),
    "CastLike": Rule(nothing, _cast, "nothing"),
    **{op: Rule(nothing, _none, "nothing: its gradient is zero") for op in WITHOUT_GRADIENT},
}
