"""Operators that stock runtimes expand themselves, in an order of their own, are expanded here, in ours.

ONNX defines some operators as functions of others; a runtime without a kernel for one inlines it at load, and the new
nodes lose their place in the emitted order. Measured with onnxruntime 1.31 and 1.23 on CPU, optimisations off: it has
no kernel for HardSwish, Mish, GroupNormalization, CastLike, NegativeLogLikelihoodLoss and SoftmaxCrossEntropyLoss.
BatchNormalization with ``training_mode`` is expanded because the backward pass wants what it computes in between.
``OWN`` operators are kept whole inside the export alone and are expanded here for every graph that is written.

Knows the builder and the shapes of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from onnx import helper

from edgetune.autodiff.builder import GraphBuilder
from edgetune.autodiff.convolution import FORM, emit_scaled_weight
from edgetune.autodiff.graph import ForwardGraph, Node
from edgetune.autodiff.linear import emit_linear

_FLOAT, _INT64 = 1, 7  # onnx.TensorProto

OWN = ("Gelu", "Linear", "Swish")
"""What no graph in a bundle has: Linear is this project's own, Gelu and Swish are of opsets 20 and 24."""
GELU_TANH = (math.sqrt(2.0 / math.pi), math.sqrt(2.0 / math.pi) * 0.044715)
"""Coefficients of x and x³ in the argument of tanh-GELU."""


def batch_ones(g: GraphBuilder, tensor: str, shape: Sequence[int], to: int = _FLOAT) -> str:
    """Emit ones as many as ``tensor`` is long along its batch axis, every other axis 1; of element type ``to``.

    A stand-in for the batch extent, without a Shape node (runtimes hoist those out of the emitted order). Made by
    comparisons, so that a NaN in ``tensor`` stays where it is.
    """
    axes = [i for i, extent in enumerate(shape) if extent > 1]
    if axes:
        ends = g.const([1] * len(axes))
        tensor = g.op("Slice", tensor, g.const([0] * len(axes)), ends, g.const(axes), hint="thin")
    positive = g.op("Greater", tensor, g.const(0.0), hint="positive")
    always = g.op("Or", positive, g.op("Not", positive, hint="otherwise"), hint="always")
    return str(g.op("Cast", always, to=to, hint="batch_ones"))


def _last(g: GraphBuilder, node: Node, op: str, *inputs: str) -> None:
    """Append the operator that makes the first output of ``node``; it takes the node's name."""
    g.nodes.append(helper.make_node(op, list(inputs), [node.outputs[0]], name=node.name))


def _hard_swish(g: GraphBuilder, node: Node, graph: ForwardGraph) -> None:
    # y = x · HardSigmoid(x; 1/6, 1/2): the operator's definition in the ONNX standard
    gate = g.op("HardSigmoid", node.inputs[0], alpha=1.0 / 6.0, beta=0.5, hint=f"{node.name}.gate")
    _last(g, node, "Mul", node.inputs[0], gate)


def _mish(g: GraphBuilder, node: Node, graph: ForwardGraph) -> None:
    # y = x · tanh(softplus(x)): the operator's definition in the ONNX standard
    gate = g.op("Tanh", g.op("Softplus", node.inputs[0], hint=f"{node.name}.soft"), hint=f"{node.name}.gate")
    _last(g, node, "Mul", node.inputs[0], gate)


def _gelu(g: GraphBuilder, node: Node, graph: ForwardGraph) -> None:
    # y = x·(1 + erf(x/√2))/2, or with tanh(c·x + d·x³) in the place of erf: the operator's definition (opset 20).
    # The order of the nodes is the one that onnxruntime knows as GELU where it may optimise, in trunks.
    x = node.inputs[0]
    if node.attributes["approximate"] == "tanh":
        gate = g.op("Tanh", emit_gelu_argument(g, x, *GELU_TANH), hint=f"{node.name}.gate")
    else:
        gate = g.op("Erf", g.op("Div", x, g.const(math.sqrt(2.0))), hint=f"{node.name}.gate")
    gate = g.op("Add", gate, g.const(1.0), hint=f"{node.name}.gate")
    _last(g, node, "Mul", g.op("Mul", x, gate, hint=f"{node.name}.twice"), g.const(0.5))


def emit_gelu_argument(g: GraphBuilder, x: str, linear: float, cubic: float) -> str:
    """Emit linear·x + cubic·x³."""
    factor = g.op("Mul", g.op("Mul", x, x, hint="square"), g.const(cubic), hint="factor")
    return str(g.op("Mul", g.op("Add", factor, g.const(linear), hint="factor"), x, hint="argument"))


def _swish(g: GraphBuilder, node: Node, graph: ForwardGraph) -> None:
    # y = x·σ(αx): the operator's definition (opset 24)
    x, alpha = node.inputs[0], float(node.attributes["alpha"])
    argument = x if alpha == 1.0 else g.op("Mul", x, g.const(alpha), hint=f"{node.name}.argument")
    _last(g, node, "Mul", x, g.op("Sigmoid", argument, hint=f"{node.name}.gate"))


def _cast_like(g: GraphBuilder, node: Node, graph: ForwardGraph) -> None:
    target = graph.dtypes[node.outputs[0]]
    g.nodes.append(helper.make_node("Cast", [node.inputs[0]], [node.outputs[0]], name=node.name, to=target))


def _reduce(g: GraphBuilder, node: Node, graph: ForwardGraph) -> None:
    # Over no axes at all it changes nothing; onnxruntime 1.23 fails at run time there.
    if node.attributes.get("noop_with_empty_axes", 0) and not node.input(1):
        _last(g, node, "Identity", node.inputs[0])
    else:
        g.nodes.append(node.to_proto())


def _group_norm(g: GraphBuilder, node: Node, graph: ForwardGraph) -> None:
    # Opset 18 has one scale and one bias per group: an instance norm whose channels are the groups.
    groups = g.const([0, int(node.attributes["num_groups"]), -1])
    grouped = g.op("Reshape", node.inputs[0], groups, hint=f"{node.name}.grouped")
    epsilon = float(node.attributes.get("epsilon", 1e-5))
    normed = g.op("InstanceNormalization", grouped, *node.inputs[1:3], epsilon=epsilon, hint=f"{node.name}.normed")
    _last(g, node, "Reshape", normed, g.const(graph.reshape_target(node.inputs[0])))


def _batch_norm(g: GraphBuilder, node: Node, graph: ForwardGraph) -> None:
    if node.attributes.get("training_mode", 0):
        emit_batch_statistics_norm(g, node, graph)
    else:
        g.nodes.append(node.to_proto())


def emit_batch_statistics_norm(g: GraphBuilder, node: Node, graph: ForwardGraph) -> tuple[str, str]:
    """Emit BatchNormalization with the statistics of the batch; return μ and 1/σ [1, c, 1..], which the gradient needs.

        μ = mean(x),  σ² = mean((x - μ)²) + ε,  x̂ = (x - μ)/σ,  y = γ·x̂ + β       over all axes but the channel's
        running mean ← m·old + (1 - m)·μ,   running variance ← m·old + (1 - m)·var·n/(n - 1)

    n is the number of elements per channel. The running variance is the unbiased one, as in torch (the ONNX standard
    takes the biased one); ``momentum`` m has ONNX's sense. For n = 1 the correction is left out.
    """
    x, gamma, beta, old_mean, old_variance = node.inputs[:5]
    shape = graph.shapes[x]
    axes = g.const([i for i in range(len(shape)) if i != 1])
    row = g.const([-1, *[1] * (len(shape) - 2)])
    mean = g.op("ReduceMean", x, axes, keepdims=1, hint="mean")
    centred = g.op("Sub", x, mean, hint="centred")
    variance = g.op("ReduceMean", g.op("Mul", centred, centred, hint="square"), axes, keepdims=1, hint="variance")
    epsilon = g.const(float(node.attributes.get("epsilon", 1e-5)))
    inverse = g.op("Reciprocal", g.op("Sqrt", g.op("Add", variance, epsilon)), hint="inverse_deviation")
    normed = g.op("Mul", centred, inverse, hint="normed")
    scaled = g.op("Mul", normed, g.op("Reshape", gamma, row, hint="gamma"), hint="scaled")
    _last(g, node, "Add", scaled, g.op("Reshape", beta, row, hint="beta"))

    momentum = float(node.attributes.get("momentum", 0.9))
    flat = g.const([-1])

    def update(old: str, fresh: str, output: str) -> None:
        share = g.op("Mul", g.op("Reshape", fresh, flat), g.const(1.0 - momentum), hint="share")
        rest = g.op("Mul", old, g.const(momentum), hint="rest")
        g.nodes.append(helper.make_node("Add", [rest, share], [output], name=output))

    if len(node.outputs) > 1 and node.outputs[1]:
        update(old_mean, mean, node.outputs[1])
    if len(node.outputs) > 2 and node.outputs[2]:
        positions = float(math.prod(shape[2:]))
        count = g.op("ReduceSum", batch_ones(g, normed, shape), keepdims=0, hint="samples")
        count = g.op("Mul", count, g.const(positions), hint="count")
        fewer = g.op("Max", g.op("Sub", count, g.const(1.0)), g.const(1.0), hint="count_minus_one")
        update(old_variance, g.op("Mul", variance, g.op("Div", count, fewer), hint="unbiased"), node.outputs[2])
    return str(mean), str(inverse)


def emit_class_weights(g: GraphBuilder, node: Node, graph: ForwardGraph) -> tuple[str, str]:
    """Emit, for a loss node (scores [b, classes, d..], target [b, d..], maybe class weights): class and weight.

    Returns the class of every position, int64 [b, 1, d..], 0 where it is ignored, and its weight, float32 [b, 1, d..],
    0 where it is ignored.
    """
    target = g.op("Unsqueeze", node.inputs[1], g.const([1]), hint="target")
    if graph.dtypes.get(node.inputs[1], _INT64) != _INT64:
        target = g.op("Cast", target, to=_INT64, hint="target")
    ignored = node.attributes.get("ignore_index")
    if ignored is None:
        counted = g.op("Equal", target, target, hint="counted")
    else:
        counted = g.op("Not", g.op("Equal", target, g.const(np.array(ignored, np.int64))), hint="counted")
        target = g.op("Mul", target, g.op("Cast", counted, to=_INT64), hint="target")
    weight = g.op("Cast", counted, to=_FLOAT, hint="weight")
    if node.input(2):
        weight = g.op("Mul", weight, g.op("Gather", node.inputs[2], target, hint="class_weight"), hint="weight")
    return str(target), str(weight)


def _emit_weighted_loss(g: GraphBuilder, node: Node, graph: ForwardGraph, log_p: str) -> None:
    # l = -w[target]·log p[target]; its sum, or its mean over the weights, or as it is
    target, weight = emit_class_weights(g, node, graph)
    picked = g.op("GatherElements", log_p, target, axis=1, hint="picked")
    cost = g.op("Neg", g.op("Mul", picked, weight, hint="cost"), hint="cost")
    reduction = node.attributes.get("reduction", "mean")
    if reduction == "none":
        _last(g, node, "Squeeze", cost, g.const([1]))
    else:
        total = g.op("ReduceSum", cost, keepdims=0, hint="total")
        divisor = g.op("ReduceSum", weight, keepdims=0, hint="weights") if reduction == "mean" else g.const(1.0)
        _last(g, node, "Div", total, divisor)


def _negative_log_likelihood(g: GraphBuilder, node: Node, graph: ForwardGraph) -> None:
    _emit_weighted_loss(g, node, graph, node.inputs[0])


def emit_softmax_cross_entropy(g: GraphBuilder, node: Node, graph: ForwardGraph) -> str:
    """Emit SoftmaxCrossEntropyLoss; return log p, which is its second output where it has one."""
    log_p = node.outputs[1] if len(node.outputs) > 1 and node.outputs[1] else g.fresh("log_p")
    g.nodes.append(helper.make_node("LogSoftmax", [node.inputs[0]], [log_p], name=log_p, axis=1))
    _emit_weighted_loss(g, node, graph, log_p)
    return log_p


def _softmax_cross_entropy(g: GraphBuilder, node: Node, graph: ForwardGraph) -> None:
    emit_softmax_cross_entropy(g, node, graph)


def _conv(g: GraphBuilder, node: Node, graph: ForwardGraph) -> None:
    inputs = [node.inputs[0], emit_scaled_weight(g, node), *([node.inputs[2]] if node.input(2) else [])]
    attributes = {name: value for name, value in node.attributes.items() if name != FORM}
    g.nodes.append(helper.make_node("Conv", inputs, [node.outputs[0]], name=node.name, **attributes))


_LOWERED: dict[str, Callable[[GraphBuilder, Node, ForwardGraph], None]] = {
    "BatchNormalization": _batch_norm,
    "CastLike": _cast_like,
    "Conv": _conv,
    "Gelu": _gelu,
    "GroupNormalization": _group_norm,
    "HardSwish": _hard_swish,
    "Linear": lambda g, node, graph: emit_linear(g, node),
    "Mish": _mish,
    "NegativeLogLikelihoodLoss": _negative_log_likelihood,
    "ReduceMean": _reduce,
    "ReduceSum": _reduce,
    "SoftmaxCrossEntropyLoss": _softmax_cross_entropy,
    "Swish": _swish,
}


def emit_node(g: GraphBuilder, node: Node, graph: ForwardGraph) -> None:
    """Append ``node`` to ``g``, expanded where a runtime would; ``graph`` knows the shapes of its tensors."""
    lower = _LOWERED.get(node.op)
    if lower is None:
        g.nodes.append(node.to_proto())
    else:
        lower(g, node, graph)
