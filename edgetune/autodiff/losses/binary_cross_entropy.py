"""Binary cross-entropy of logits, element by element. Knows the builder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgetune.autodiff.builder import FunctionLibrary, GraphBuilder
from edgetune.autodiff.losses.base import EmittedLoss, LossConfig, emit_batch, function_name, per_class
from edgetune.errors import UsageError


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Sigmoid cross-entropy with float32 targets y of the output's shape, as torch's ``..._with_logits``.

    With N the number of elements and P the weight of the positive answers, per channel (axis 1; the option
    ``class_weights``; 1 where none are given):

        loss      = 1/N Σ (1 - y)·z + (1 + (P - 1)·y)·softplus(-z)
        dz        = ((1 + (P - 1)·y)·sigmoid(z) - P·y) / N

    Targets are probabilities; nothing is ever ``correct``.
    """

    config: LossConfig

    def __post_init__(self) -> None:
        self.config.check_only("class_weights")

    def target(self, output: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
        weights, channels = len(self.config.class_weights), output[0] if output else 0
        if weights not in (0, channels):
            raise UsageError(f"{weights} class weights were given for an output of {channels} channels")
        return output, "float32"

    def emit(
        self, g: GraphBuilder, library: FunctionLibrary, output: str, shape: tuple[int, ...], targets: str
    ) -> EmittedLoss:
        self.target(shape)
        positive = per_class(np.array(self.config.class_weights, np.float32), len(shape) - 1) if shape else np.array([])

        def body(g: GraphBuilder, names: Sequence[str]) -> Sequence[str]:
            z, y = names
            count = g.op("Mul", emit_batch(g, z, shape), g.const(float(np.prod(shape))), hint="count")
            softplus = g.op("Softplus", g.op("Neg", z, hint="minus"), hint="softplus")
            p = g.op("Sigmoid", z, hint="p")
            truth = y
            if positive.size:
                raised = g.op("Mul", y, g.const(positive - np.float32(1)), hint="raised")
                factor = g.op("Add", raised, g.const(1.0), hint="factor")
                softplus, p = g.op("Mul", factor, softplus, hint="cost"), g.op("Mul", factor, p, hint="p")
                truth = g.op("Mul", y, g.const(positive), hint="truth")
            linear = g.op("Mul", g.op("Sub", g.const(1.0), y, hint="negative"), z, hint="linear")
            cost = g.op("Add", linear, softplus, hint="cost")
            loss = g.op("Div", g.op("ReduceSum", cost, keepdims=0, hint="cost"), count, hint="loss")
            gradient = g.op("Div", g.op("Sub", p, truth, hint="excess"), count, hint="d_logits")
            return [loss, gradient]

        label = function_name("BinaryCrossEntropy", shape, self.config)
        return EmittedLoss(*library.call(g, label, [output, targets], ["loss", "d_logits"], body))
