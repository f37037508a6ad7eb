"""Losses and their gradients, as model-local functions. Knows the builder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgetune.autodiff.builder import FunctionLibrary, GraphBuilder
from edgetune.errors import UsageError, choices

_FLOAT = 1  # onnx.TensorProto.FLOAT


@dataclass(frozen=True)
class EmittedLoss:
    """Names: the scalar loss, its gradient with respect to the logits, the number of correct answers (float32)."""

    loss: str
    gradient: str
    correct: str


def emit_cross_entropy(
    g: GraphBuilder, library: FunctionLibrary, logits: str, targets: str, classes: int, label_smoothing: float
) -> EmittedLoss:
    """Emit softmax cross-entropy, averaged over the batch, and its gradient.

        q[b,k]    = (1 - a)·[k = target_b] + a / classes                  a: label smoothing (Szegedy et al. 2016)
        loss      = -1/B Σ_b,k q·log softmax(logits)
        d logits  = (softmax(logits) - q) / B

    ``logits`` is float32 [b, classes]; ``targets`` int64 [b].
    """

    def body(g: GraphBuilder, names: Sequence[str]) -> Sequence[str]:
        z, target = names
        column = g.op("Unsqueeze", target, g.const([1]), hint="column")
        labels = g.const(np.arange(classes, dtype=np.int64)[None, :])
        one_hot = g.op("Cast", g.op("Equal", column, labels, hint="is_target"), to=_FLOAT, hint="one_hot")
        # The batch extent, without a Shape node: runtimes hoist those out of the emitted order.
        rows = g.op("ReduceSum", one_hot, keepdims=0, hint="rows")
        smooth = g.op("Mul", one_hot, g.const(1.0 - label_smoothing), hint="q")
        q = g.op("Add", smooth, g.const(label_smoothing / classes), hint="q")
        log_p = g.op("LogSoftmax", z, axis=1, hint="log_p")
        cost = g.op("ReduceSum", g.op("Mul", q, log_p, hint="cost"), keepdims=0, hint="cost")
        loss = g.op("Neg", g.op("Div", cost, rows, hint="mean"), hint="loss")
        excess = g.op("Sub", g.op("Exp", log_p, hint="p"), q, hint="excess")
        gradient = g.op("Div", excess, rows, hint="d_logits")
        hit = g.op("Equal", g.op("ArgMax", z, axis=1, keepdims=0, hint="best"), target, hint="hit")
        correct = g.op("ReduceSum", g.op("Cast", hit, to=_FLOAT, hint="hit"), keepdims=0, hint="correct")
        return [loss, gradient, correct]

    label = f"SoftmaxCrossEntropy_{classes}_{label_smoothing:g}".replace(".", "p").replace("-", "m")
    return EmittedLoss(*library.call(g, label, [logits, targets], ["loss", "d_logits", "correct"], body))


LossEmitter = Callable[[GraphBuilder, FunctionLibrary, str, str, int, float], EmittedLoss]
LOSSES: dict[str, LossEmitter] = {"cross_entropy": emit_cross_entropy}


def loss_named(kind: str) -> LossEmitter:
    """Return the emitter of the loss ``kind``.

    Raises:
        UsageError: there is none; the message lists those that there are.
    """
    if kind not in LOSSES:
        raise UsageError(f"there is no loss '{kind}'; choose one of: {choices(LOSSES)}")
    return LOSSES[kind]
