"""The mean of the squared differences. Knows the builder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgetune.autodiff.builder import FunctionLibrary, GraphBuilder
from edgetune.autodiff.losses.base import EmittedLoss, LossConfig, emit_batch, function_name


@dataclass(frozen=True)
class MeanSquaredError:
    """Mean squared error against float32 targets y of the output's shape, as ``torch.nn.functional.mse_loss``.

    With N the number of elements: loss = 1/N Σ (z - y)², dz = 2·(z - y) / N. Nothing is ever ``correct``.
    """

    config: LossConfig

    def __post_init__(self) -> None:
        self.config.check_only()

    def target(self, output: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
        return output, "float32"

    def emit(
        self, g: GraphBuilder, library: FunctionLibrary, output: str, shape: tuple[int, ...], targets: str
    ) -> EmittedLoss:
        def body(g: GraphBuilder, names: Sequence[str]) -> Sequence[str]:
            z, y = names
            count = g.op("Mul", emit_batch(g, z, shape), g.const(float(np.prod(shape))), hint="count")
            difference = g.op("Sub", z, y, hint="difference")
            cost = g.op("ReduceSumSquare", difference, keepdims=0, hint="cost")
            scale = g.op("Div", g.const(2.0), count, hint="scale")
            return [g.op("Div", cost, count, hint="loss"), g.op("Mul", difference, scale, hint="d_output")]

        label = function_name("MeanSquaredError", shape, self.config)
        return EmittedLoss(*library.call(g, label, [output, targets], ["loss", "d_output"], body))
