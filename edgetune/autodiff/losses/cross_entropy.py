"""Softmax cross-entropy over classes on axis 1, of vectors or of every pixel. Knows the builder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgetune.autodiff.builder import FunctionLibrary, GraphBuilder
from edgetune.autodiff.losses.base import FLOAT, EmittedLoss, LossConfig, function_name, per_class, shape_text
from edgetune.errors import ExportError, UsageError

Body = Callable[[GraphBuilder, Sequence[str]], Sequence[str]]


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy of [b, k, ...] with int64 targets [b, ...], as ``torch.nn.functional.cross_entropy``.

    With n over samples and pixels, t the target, w the class weights (1 where none are given), a the label smoothing
    (Szegedy et al. 2016), v_n = 0 where the target is the ignored one and 1 elsewhere:

        q[n,k]    = v_n · w_k · ((1 - a)·[k = t_n] + a / classes)
        N         = Σ_n v_n · w_(t_n)
        loss      = -1/N Σ_n,k q·log softmax(z)
        dz[n,k]   = (softmax(z)[n,k] · Σ_j q[n,j] - q[n,k]) / N

    Where every target is ignored N is 0, and the loss and its gradient are NaN, as in torch; a training session skips
    such a step. Targets must be classes or the ignored value. ``correct`` counts the right answers among the targets
    that are not ignored, for [b, k] only.
    """

    config: LossConfig

    def __post_init__(self) -> None:
        self.config.check_only("label_smoothing", "class_weights", "ignore_index")

    def target(self, output: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
        if not output or output[0] < 2:
            raise ExportError(
                f"the model's output has the shape {shape_text(output)}; cross_entropy needs [batch, classes, ...] "
                f"with at least two classes (for a single one choose binary_cross_entropy)"
            )
        weights = len(self.config.class_weights)
        if weights not in (0, output[0]):
            raise UsageError(f"{weights} class weights were given for an output of {output[0]} classes")
        return output[1:], "int64"

    def emit(
        self, g: GraphBuilder, library: FunctionLibrary, output: str, shape: tuple[int, ...], targets: str
    ) -> EmittedLoss:
        self.target(shape)
        smoothing = self.config.label_smoothing
        if len(shape) == 1 and not self.config.class_weights and self.config.ignore_index is None:
            label = f"SoftmaxCrossEntropy_{shape[0]}_{smoothing:g}".replace(".", "p").replace("-", "m")
            body = self._plain_body(shape[0])
        else:
            label, body = function_name("SoftmaxCrossEntropy", shape, self.config), self._body(shape)
        hints = ["loss", "d_logits"] + (["correct"] if len(shape) == 1 else [])
        return EmittedLoss(*library.call(g, label, [output, targets], hints, body))

    def _plain_body(self, classes: int) -> Body:
        """Few classes, one answer per sample: one-hot rows are small, and everything is elementwise."""
        smoothing = self.config.label_smoothing

        def body(g: GraphBuilder, names: Sequence[str]) -> Sequence[str]:
            z, target = names
            column = g.op("Unsqueeze", target, g.const([1]), hint="column")
            labels = g.const(np.arange(classes, dtype=np.int64)[None, :])
            one_hot = g.op("Cast", g.op("Equal", column, labels, hint="is_target"), to=FLOAT, hint="one_hot")
            # The batch extent, without a Shape node: runtimes hoist those out of the emitted order.
            rows = g.op("ReduceSum", one_hot, keepdims=0, hint="rows")
            smooth = g.op("Mul", one_hot, g.const(1.0 - smoothing), hint="q")
            q = g.op("Add", smooth, g.const(smoothing / classes), hint="q")
            log_p = g.op("LogSoftmax", z, axis=1, hint="log_p")
            cost = g.op("ReduceSum", g.op("Mul", q, log_p, hint="cost"), keepdims=0, hint="cost")
            loss = g.op("Neg", g.op("Div", cost, rows, hint="mean"), hint="loss")
            excess = g.op("Sub", g.op("Exp", log_p, hint="p"), q, hint="excess")
            gradient = g.op("Div", excess, rows, hint="d_logits")
            hit = g.op("Equal", g.op("ArgMax", z, axis=1, keepdims=0, hint="best"), target, hint="hit")
            correct = g.op("ReduceSum", g.op("Cast", hit, to=FLOAT, hint="hit"), keepdims=0, hint="correct")
            return [loss, gradient, correct]

        return body

    def _body(self, shape: tuple[int, ...]) -> Body:
        """No one-hot tensor: what concerns the target alone is gathered and scattered along the class axis.

        The division by N happens in tensors of one channel; of the output's size are only log p, p and the gradient.
        """
        config, classes, axes = self.config, shape[0], len(shape) - 1
        share = config.label_smoothing / classes
        weights = np.array(config.class_weights or [1.0] * classes, np.float32)

        def body(g: GraphBuilder, names: Sequence[str]) -> Sequence[str]:
            z, target = names
            column = g.op("Unsqueeze", target, g.const([1]), hint="column")
            if config.ignore_index is None:
                # True everywhere: a tensor of ones, made from the targets because a shape may not be asked for.
                counts = g.op("GreaterOrEqual", column, g.const(np.array(0, np.int64)), hint="counts")
                index = column
            else:
                ignored = g.op("Equal", column, g.const(np.array(config.ignore_index, np.int64)), hint="ignored")
                counts = g.op("Not", ignored, hint="counts")
                index = g.op("Where", counts, column, g.const(np.array(0, np.int64)), hint="index")
            valid = g.op("Cast", counts, to=FLOAT, hint="valid")
            weight = valid
            if config.class_weights:
                of_target = g.op("Gather", g.const(weights), index, hint="of_target")
                weight = g.op("Mul", of_target, valid, hint="weight")
            total = g.op("ReduceSum", weight, keepdims=0, hint="total")
            log_p = g.op("LogSoftmax", z, axis=1, hint="log_p")
            log_p_target = g.op("GatherElements", log_p, index, axis=1, hint="log_p_target")
            own = g.op("Mul", weight, g.const(1.0 - config.label_smoothing), hint="own")
            cost = g.op("Mul", own, log_p_target, hint="cost")
            mass = own
            if share:
                shared = log_p
                if config.class_weights:
                    shared = g.op("Mul", log_p, g.const(per_class(weights, axes)), hint="shared")
                shared = g.op("ReduceSum", shared, g.const([1]), keepdims=1, hint="shared")
                spread = g.op("Mul", valid, g.const(share), hint="spread")
                cost = g.op("Add", cost, g.op("Mul", spread, shared, hint="shared"), hint="cost")
                mass = g.op("Add", own, g.op("Mul", spread, g.const(float(weights.sum())), hint="mass"), hint="mass")
            mean = g.op("Div", g.op("ReduceSum", cost, keepdims=0, hint="cost"), total, hint="mean")
            loss = g.op("Neg", mean, hint="loss")
            p = g.op("Exp", log_p, hint="p")
            gradient = g.op("Mul", p, g.op("Div", mass, total, hint="mass"), hint="d_logits")
            if share:
                everywhere = g.op("Div", spread, total, hint="everywhere")
                if config.class_weights:
                    everywhere = g.op("Mul", everywhere, g.const(per_class(weights, axes)), hint="everywhere")
                gradient = g.op("Sub", gradient, everywhere, hint="d_logits")
            at_target = g.op("Neg", g.op("Div", own, total, hint="at_target"), hint="at_target")
            gradient = g.op("ScatterElements", gradient, index, at_target, axis=1, reduction="add", hint="d_logits")
            if axes:
                return [loss, gradient]
            best = g.op("ArgMax", z, axis=1, keepdims=1, hint="best")
            hit = g.op("And", g.op("Equal", best, column, hint="hit"), counts, hint="hit")
            correct = g.op("ReduceSum", g.op("Cast", hit, to=FLOAT, hint="hit"), keepdims=0, hint="correct")
            return [loss, gradient, correct]

        return body
