"""Soft Dice: one minus the overlap of probabilities and truth. Knows the builder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgetune.autodiff.builder import FunctionLibrary, GraphBuilder
from edgetune.autodiff.losses.base import FLOAT, EmittedLoss, LossConfig, function_name, per_class, shape_text
from edgetune.errors import ExportError

SMOOTH = 1.0


@dataclass(frozen=True)
class Dice:
    """Soft Dice of [b, k, y, x] (any number of spatial axes) with int64 targets [b, y, x].

    Per sample and class, x over the pixels that are not ignored, p = softmax(z) over the classes, g[k,x] = [k = t_x],
    s the option ``smooth`` (1 unless given):

        I = Σ_x p·g        A = 2·I + s        C = Σ_x p + Σ_x g + s
        loss    = 1 - mean over b,k of A / C
        dp[k,x] = (A / C² - 2·g / C) / (B·K)
        dz[k,x] = p[k,x] · (dp[k,x] - Σ_j p[j,x]·dp[j,x])

    An output of one channel is binary: p = sigmoid(z), targets 0 and 1, dz = dp·p·(1 - p). The overlap as a loss is
    Milletari, Navab, Ahmadi: "V-Net", 2016, equation 2 (there with squares below the line); with plain sums below it,
    and a constant added above and below, it is Sudre et al.: "Generalised Dice overlap", 2017, the loss DL2. A sample
    without a single pixel that counts contributes 0. Nothing is ever ``correct``.
    """

    config: LossConfig

    def __post_init__(self) -> None:
        self.config.check_only("ignore_index", "smooth")

    def target(self, output: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
        if len(output) < 2:
            raise ExportError(
                f"the model's output has the shape {shape_text(output)}; dice needs [batch, classes, ...] with at "
                f"least one axis of pixels"
            )
        return output[1:], "int64"

    def emit(
        self, g: GraphBuilder, library: FunctionLibrary, output: str, shape: tuple[int, ...], targets: str
    ) -> EmittedLoss:
        self.target(shape)
        smooth = SMOOTH if self.config.smooth is None else self.config.smooth
        binary, ignore, axes = shape[0] == 1, self.config.ignore_index, len(shape) - 1
        labels = per_class(np.array([1]) if binary else np.arange(shape[0]), axes)

        def body(g: GraphBuilder, names: Sequence[str]) -> Sequence[str]:
            z, target = names
            pixels = g.const(list(range(2, 2 + axes)))
            column = g.op("Unsqueeze", target, g.const([1]), hint="column")
            p = g.op("Sigmoid", z, hint="p") if binary else g.op("Softmax", z, axis=1, hint="p")
            counted = p
            if ignore is not None:
                counts = g.op("Not", g.op("Equal", column, g.const(np.array(ignore, np.int64)), hint="out"), hint="in")
                column = g.op("Where", counts, column, g.const(np.array(-1, np.int64)), hint="column")
                valid = g.op("Cast", counts, to=FLOAT, hint="valid")
                counted = g.op("Mul", p, valid, hint="counted")
            is_class = g.op("Equal", column, g.const(labels.astype(np.int64)), hint="is_class")
            truth = g.op("Cast", is_class, to=FLOAT, hint="truth")
            both = g.op("ReduceSum", g.op("Mul", p, truth, hint="both"), pixels, keepdims=1, hint="both")
            of_truth = g.op("ReduceSum", truth, pixels, keepdims=1, hint="of_truth")
            of_p = g.op("ReduceSum", counted, pixels, keepdims=1, hint="of_p")
            above = g.op("Add", g.op("Mul", both, g.const(2.0), hint="twice"), g.const(smooth), hint="above")
            below = g.op("Add", g.op("Add", of_p, of_truth, hint="sum"), g.const(smooth), hint="below")
            overlap = g.op("Div", above, below, hint="overlap")
            loss = g.op("Sub", g.const(1.0), g.op("ReduceMean", overlap, keepdims=0, hint="mean"), hint="loss")
            # How many terms the mean has: the sums of the truth are never negative.
            one = g.op("Cast", g.op("GreaterOrEqual", of_truth, g.const(0.0), hint="is_one"), to=FLOAT, hint="one")
            terms = g.op("ReduceSum", one, keepdims=0, hint="terms")
            share = g.op("Div", g.op("Div", g.const(1.0), below, hint="share"), terms, hint="share")
            rise = g.op("Mul", overlap, share, hint="rise")
            if ignore is not None:
                rise = g.op("Mul", rise, valid, hint="rise")
            fall = g.op("Mul", truth, g.op("Mul", share, g.const(2.0), hint="fall"), hint="fall")
            dp = g.op("Sub", rise, fall, hint="dp")
            if binary:
                # 1 - p, without the cancellation where p is nearly 1.
                rest = g.op("Sigmoid", g.op("Neg", z, hint="minus"), hint="rest")
                gradient = g.op("Mul", g.op("Mul", dp, p, hint="d"), rest, hint="d_logits")
            else:
                inner = g.op("ReduceSum", g.op("Mul", p, dp, hint="inner"), g.const([1]), keepdims=1, hint="inner")
                gradient = g.op("Mul", p, g.op("Sub", dp, inner, hint="d"), hint="d_logits")
            return [loss, gradient]

        label = f"{function_name('Dice', shape, self.config)}_{smooth:g}".replace(".", "p").replace("-", "m")
        return EmittedLoss(*library.call(g, label, [output, targets], ["loss", "d_logits"], body))
