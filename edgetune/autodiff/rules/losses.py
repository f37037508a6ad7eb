"""Reverse rules of losses that exporters emit as one node: scores [b, classes, d..], targets [b, d..] integers.

    l = -w[t]·log p[t];  d log p = -w[t]·dy·(one-hot of t);  log p = log softmax z:  dz = d log p - p·Σ d log p

With ``reduction`` "mean", dy is divided by the sum of the weights. Ignored targets have the weight 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgetune.autodiff.graph import ForwardGraph, Node
from edgetune.autodiff.lowering import emit_class_weights, emit_softmax_cross_entropy
from edgetune.autodiff.rule import Context, Rule, Want
from edgetune.codecs.base import Use

_FLOAT = 1  # onnx.TensorProto.FLOAT


def _wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    return [Want(name, Use.VALUE) for name in node.inputs[1:3] if name]


def _log_gradient(ctx: Context, node: Node, dy: str) -> str:
    """Emit d log p."""
    g, shape = ctx.g, ctx.graph.shapes[node.inputs[0]]
    target, weight = emit_class_weights(g, node, ctx.graph)
    labels = np.arange(shape[1], dtype=np.int64).reshape(-1, *[1] * (len(shape) - 2))
    one_hot = g.op("Cast", g.op("Equal", target, g.const(labels), hint="is_target"), to=_FLOAT, hint="one_hot")
    reduction = node.attributes.get("reduction", "mean")
    if reduction == "none":
        dy = g.op("Unsqueeze", dy, g.const([1]), hint="dy")
    elif reduction == "mean":
        dy = g.op("Div", dy, g.op("ReduceSum", weight, keepdims=0, hint="weights"), hint="dy")
    factor = g.op("Neg", g.op("Mul", weight, dy, hint="factor"), hint="factor")
    return str(g.op("Mul", one_hot, factor, hint="dlog_p"))


def _negative_log_likelihood(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    return {0: _log_gradient(ctx, node, dy)} if 0 in wrt else {}


def _softmax_forward(ctx: Context, node: Node) -> tuple[str, ...]:
    return (emit_softmax_cross_entropy(ctx.g, node, ctx.graph),)


def _softmax_of_many(ctx: Context, node: Node, wrt: frozenset[int], dys: Sequence[str | None]) -> Mapping[int, str]:
    if 0 not in wrt:
        return {}
    g = ctx.g
    parts = [_log_gradient(ctx, node, dys[0])] if dys[0] is not None else []
    parts += [dy for dy in dys[1:] if dy is not None]
    total = parts[0] if len(parts) == 1 else g.op("Add", *parts, hint="dlog_p")
    summed = g.op("ReduceSum", total, g.const([1]), keepdims=1, hint="summed")
    p = g.op("Exp", ctx.kept(node)[0], hint="p")
    return {0: g.op("Sub", total, g.op("Mul", p, summed, hint="share"), hint="dscores")}


def _softmax(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    return _softmax_of_many(ctx, node, wrt, [dy])


RULES = {
    "NegativeLogLikelihoodLoss": Rule(_wants, _negative_log_likelihood, "its targets"),
    "SoftmaxCrossEntropyLoss": Rule(
        _wants, _softmax, "log p and its targets", forward=_softmax_forward, backward_of_many=_softmax_of_many
    ),
}
