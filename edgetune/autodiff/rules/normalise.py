"""Reverse rules of normalisations.

Of x̂ = (x - μ)/σ over some axes, with σ² = var + ε (Ioffe and Szegedy, 2015, section 3; Ba et al., 2016):

    dx = (dx̂ - mean(dx̂) - x̂·mean(dx̂·x̂))/σ,   y = γ·x̂ + β:  dx̂ = γ·dy,  dγ = Σ dy·x̂,  dβ = Σ dy
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgetune.autodiff.builder import GraphBuilder
from edgetune.autodiff.graph import ForwardGraph, Node
from edgetune.autodiff.lowering import emit_batch_statistics_norm
from edgetune.autodiff.rule import Context, Rule, Want, sum_to
from edgetune.codecs.base import Use
from edgetune.errors import UnsupportedOperatorError


def _input_gradient(g: GraphBuilder, dnormed: str, normed: str, inverse: str, axes: Sequence[int]) -> str:
    """Emit dx from dx̂, x̂ and 1/σ."""
    over = g.const(list(axes))
    mean = g.op("ReduceMean", dnormed, over, keepdims=1, hint="mean")
    along = g.op("ReduceMean", g.op("Mul", dnormed, normed, hint="along"), over, keepdims=1, hint="along")
    rest = g.op("Sub", g.op("Sub", dnormed, mean, hint="rest"), g.op("Mul", normed, along, hint="rest"), hint="rest")
    return str(g.op("Mul", rest, inverse, hint="dx"))


def _affine(
    ctx: Context,
    wrt: frozenset[int],
    dy: str,
    normed: str,
    shape: Sequence[int],
    parameters: Mapping[int, tuple[str, Sequence[int], Sequence[int]]],
) -> dict[int, str]:
    """Emit dγ (input 1) and dβ (input 2); ``parameters`` tell name, own shape and shape as it broadcasts to x̂."""
    gradients = {}
    for i in sorted(wrt & {1, 2}):
        _, own, wide = parameters[i]
        product = ctx.g.op("Mul", dy, normed, hint="dgamma") if i == 1 else dy
        summed = sum_to(ctx.g, product, shape, wide)
        gradients[i] = ctx.g.op("Reshape", summed, ctx.g.const(list(own)), hint="d") if own != wide else summed
    return gradients


# LayerNormalization: over the axes from ``axis`` on. Kept: x, and per row the mean and 1/σ, which the operator returns.
def _layer_forward(ctx: Context, node: Node) -> tuple[str, ...]:
    given = [*node.outputs[1:], "", ""][:2]
    mean, inverse = (name or ctx.g.fresh(hint) for name, hint in zip(given, ("mean", "inverse"), strict=True))
    full = Node(node.op, node.name, node.inputs, (node.outputs[0], mean, inverse), node.attributes)
    ctx.g.nodes.append(full.to_proto())
    return mean, inverse


def _scale_and_x(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    wants = [Want(node.inputs[0], Use.VALUE)] if wrt & {0, 1} else []
    return [*wants, Want(node.inputs[1], Use.VALUE)] if 0 in wrt else wants


def _layer(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, shapes = ctx.g, ctx.graph.shapes
    shape = shapes[node.inputs[0]]
    axes = list(range(int(node.attributes.get("axis", -1)) % len(shape), len(shape)))
    mean, inverse = ctx.kept(node)
    normed = ""
    if wrt & {0, 1}:
        centred = g.op("Sub", ctx.value(node.inputs[0]), mean, hint="centred")
        normed = g.op("Mul", centred, inverse, hint="normed")
    parameters = {i: (n, shapes[n], shapes[n]) for i, n in enumerate(node.inputs) if i and n}
    gradients = _affine(ctx, wrt, dy, normed, shape, parameters)
    if 0 in wrt:
        dnormed = g.op("Mul", dy, ctx.value(node.inputs[1]), hint="dnormed")
        gradients[0] = _input_gradient(g, dnormed, normed, inverse, axes)
    return gradients


# InstanceNormalization: over the positions of each channel. GroupNormalization of opset 18, with one scale per group:
# the same on [b, groups, -1]. Kept: x; the statistics are computed again.
def _instance(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, shape = ctx.g, ctx.graph.shapes[node.inputs[0]]
    grouped = node.op == "GroupNormalization"
    if grouped:
        groups = int(node.attributes["num_groups"])
        planes = g.const([0, groups, -1])
        dy = g.op("Reshape", dy, planes, hint="dy")
        inner: tuple[int, ...] = (shape[0], groups, 2)  # whatever the last extent is, it is summed over
    else:
        inner = shape
    axes = list(range(2, len(inner)))
    row = [inner[1], *[1] * len(axes)]
    normed = inverse = ""
    if wrt & {0, 1}:
        x = ctx.value(node.inputs[0])
        x = g.op("Reshape", x, planes, hint="x") if grouped else x
        normed, inverse = _standardised(g, x, axes, float(node.attributes.get("epsilon", 1e-5)))
    parameters = {i: (node.inputs[i], (inner[1],), row) for i in (1, 2)}
    gradients = _affine(ctx, wrt, dy, normed, inner, parameters)
    if 0 in wrt:
        scale = g.op("Reshape", ctx.value(node.inputs[1]), g.const(row), hint="scale")
        dx = _input_gradient(g, g.op("Mul", dy, scale, hint="dnormed"), normed, inverse, axes)
        if grouped:
            dx = g.op("Reshape", dx, g.const(ctx.graph.reshape_target(node.inputs[0])), hint="dx")
        gradients[0] = dx
    return gradients


def _standardised(g: GraphBuilder, x: str, axes: Sequence[int], epsilon: float) -> tuple[str, str]:
    """Emit x̂ and 1/σ."""
    over = g.const(list(axes))
    centred = g.op("Sub", x, g.op("ReduceMean", x, over, keepdims=1, hint="mean"), hint="centred")
    variance = g.op("ReduceMean", g.op("Mul", centred, centred, hint="square"), over, keepdims=1, hint="variance")
    inverse = g.op("Reciprocal", g.op("Sqrt", g.op("Add", variance, g.const(epsilon))), hint="inverse")
    return str(g.op("Mul", centred, inverse, hint="normed")), str(inverse)


# BatchNormalization with the statistics of the batch (training_mode): over all axes but the channel's; kept: x, and per
# channel μ and 1/σ; x may go through a codec wherever layers' inputs do.
# With frozen ones μ and σ do not depend on x: dx = γ·dy/σ; kept: x, if γ is trained.
def _batch_forward(ctx: Context, node: Node) -> tuple[str, ...]:
    if node.attributes.get("training_mode", 0):
        return emit_batch_statistics_norm(ctx.g, node, ctx.graph)
    ctx.g.nodes.append(node.to_proto())
    return ()


def _batch_wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    wants = [Want(node.inputs[1], Use.VALUE)] if 0 in wrt else []
    if node.attributes.get("training_mode", 0):
        wants += [Want(node.inputs[0], Use.VALUE, lossy=True)] if wrt & {0, 1} else []
    else:
        wants += [Want(node.inputs[0], Use.VALUE), Want(node.inputs[3], Use.VALUE)] if 1 in wrt else []
        wants += [Want(node.inputs[4], Use.VALUE)] if wrt & {0, 1} else []
    return wants


def _batch(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, shape = ctx.g, ctx.graph.shapes[node.inputs[0]]
    trained = bool(node.attributes.get("training_mode", 0))
    axes = [i for i in range(len(shape)) if i != 1]
    row = [shape[1], *[1] * (len(shape) - 2)]

    def wide(index: int) -> str:
        return str(g.op("Reshape", ctx.value(node.inputs[index]), g.const(row), hint="wide"))

    normed = inverse = ""
    if trained and wrt & {0, 1}:
        mean, inverse = ctx.kept(node)
        centred = g.op("Sub", ctx.value(node.inputs[0]), mean, hint="centred")
        normed = g.op("Mul", centred, inverse, hint="normed")
    elif wrt & {0, 1}:
        epsilon = g.const(float(node.attributes.get("epsilon", 1e-5)))
        inverse = g.op("Reciprocal", g.op("Sqrt", g.op("Add", wide(4), epsilon)), hint="inverse")
        if 1 in wrt:
            centred = g.op("Sub", ctx.value(node.inputs[0]), wide(3), hint="centred")
            normed = g.op("Mul", centred, inverse, hint="normed")
    parameters = {i: (node.inputs[i], (shape[1],), row) for i in (1, 2)}
    gradients = _affine(ctx, wrt, dy, normed, shape, parameters)
    if 0 in wrt and trained:
        dnormed = g.op("Mul", dy, wide(1), hint="dnormed")
        gradients[0] = _input_gradient(g, dnormed, normed, inverse, axes)
    elif 0 in wrt:
        gradients[0] = g.op("Mul", dy, g.op("Mul", wide(1), inverse, hint="slope"), hint="dx")
    return gradients


# LpNormalization: y = x/n with n = ‖x‖ over one axis; dx = (dy - v·Σ dy·y)/n with v = y for p = 2, sign(x) for p = 1
def _lp_wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    return [Want(node.inputs[0], Use.VALUE)]


def _lp(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, x, p = ctx.g, ctx.value(node.inputs[0]), int(node.attributes.get("p", 2))
    if p not in (1, 2):
        raise UnsupportedOperatorError(f"LpNormalization '{node.name}' has p = {p}; the ONNX standard knows 1 and 2")
    over = g.const([int(node.attributes.get("axis", -1))])
    norm = g.op(f"ReduceL{p}", x, over, keepdims=1, hint="norm")
    y = g.op("Div", x, norm, hint="y")
    along = g.op("ReduceSum", g.op("Mul", dy, y, hint="along"), over, keepdims=1, hint="along")
    direction = y if p == 2 else g.op("Sign", x, hint="sign")
    rest = g.op("Sub", dy, g.op("Mul", direction, along, hint="radial"), hint="rest")
    return {0: g.op("Div", rest, norm, hint="dx")}


# Softmax: dx = y·(dy - Σ dy·y).  LogSoftmax: dx = dy - exp(y)·Σ dy.  Over one axis; its output is kept.
def _softmax_wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    return [Want(node.outputs[0], Use.VALUE)]


def _softmax(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, y = ctx.g, ctx.value(node.outputs[0])
    over = g.const([int(node.attributes.get("axis", -1))])
    along = g.op("ReduceSum", g.op("Mul", dy, y, hint="along"), over, keepdims=1, hint="along")
    return {0: g.op("Mul", g.op("Sub", dy, along, hint="rest"), y, hint="dx")}


def _log_softmax(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, y = ctx.g, ctx.value(node.outputs[0])
    total = g.op("ReduceSum", dy, g.const([int(node.attributes.get("axis", -1))]), keepdims=1, hint="total")
    return {0: g.op("Sub", dy, g.op("Mul", g.op("Exp", y, hint="p"), total, hint="share"), hint="dx")}


RULES = {
    "LayerNormalization": Rule(_scale_and_x, _layer, "its input and 2 numbers per row", forward=_layer_forward),
    "InstanceNormalization": Rule(_scale_and_x, _instance, "its input"),
    "GroupNormalization": Rule(_scale_and_x, _instance, "its input"),
    "BatchNormalization": Rule(
        _batch_wants,
        _batch,
        "its input and 2 numbers per channel (frozen: its input, for the scale)",
        forward=_batch_forward,
    ),
    "LpNormalization": Rule(_lp_wants, _lp, "its input"),
    "Softmax": Rule(_softmax_wants, _softmax, "its output"),
    "LogSoftmax": Rule(_softmax_wants, _log_softmax, "its output"),
}
