"""What every loss is: its options, what it takes, what it emits. Knows the builder."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Protocol

from edgetune.autodiff.builder import FunctionLibrary, GraphBuilder
from edgetune.autodiff.lowering import batch_ones
from edgetune.codecs.base import Array
from edgetune.errors import UsageError

FLOAT = 1  # onnx.TensorProto.FLOAT


@dataclass(frozen=True)
class LossConfig:
    """The choice of a loss and its options; an option left at its default is not used.

    Attributes:
        kind: a name in ``LOSSES``.
        label_smoothing: share of the target that is spread evenly over the classes, 0 <= value < 1.
        class_weights: one weight per class (binary cross-entropy: the weight of the positive answers, per channel).
        ignore_index: targets of this value count for nothing.
        smooth: what Dice adds to numerator and denominator; None stands for its default.
    """

    kind: str = "cross_entropy"
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()
    ignore_index: int | None = None
    smooth: float | None = None

    def check_only(self, *known: str) -> None:
        """Raise UsageError if an option besides ``kind`` and ``known`` is used, or one is out of range."""
        for field in fields(self):
            if field.name not in ("kind", *known) and getattr(self, field.name) != field.default:
                allowed = ", ".join(known) if known else "no options"
                raise UsageError(f"the loss '{self.kind}' takes {allowed}; it has no {field.name.replace('_', ' ')}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UsageError(f"label smoothing {self.label_smoothing} is out of range: expected 0 <= value < 1")
        if any(not (math.isfinite(w) and w >= 0.0) for w in self.class_weights):
            raise UsageError(f"class weights {self.class_weights} are wrong: expected finite values of at least 0")
        if self.class_weights and not any(self.class_weights):
            raise UsageError("class weights that are all 0 leave nothing to learn; give at least one that is positive")
        if self.smooth is not None and not (math.isfinite(self.smooth) and self.smooth > 0.0):
            raise UsageError(f"smooth = {self.smooth} is out of range: expected a finite value above 0")


@dataclass(frozen=True)
class EmittedLoss:
    """Names: the scalar loss, its gradient with respect to the output, the number of right answers (float32 scalar).

    ``correct`` is None where one sample has more than one answer or none that is right or wrong.
    """

    loss: str
    gradient: str
    correct: str | None = None


class Loss(Protocol):
    """A loss of one output and its targets, the batch leading both.

    Laws: the loss is a scalar, a mean as its docstring defines it; the gradient has the output's shape and is exact
    for float32 inputs up to rounding, also where exponentials would overflow; the emitted nodes read no shape at run
    time (no Shape, Size or ConstantOfShape), because runtimes hoist such nodes out of the emitted order.
    """

    def target(self, output: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
        """Return the shape of one sample's target and its numpy dtype, for one sample's ``output`` shape.

        Raises:
            ExportError: outputs of this shape do not suit the loss.
            UsageError: the options do not suit outputs of this shape.
        """
        ...

    def emit(
        self, g: GraphBuilder, library: FunctionLibrary, output: str, shape: tuple[int, ...], targets: str
    ) -> EmittedLoss:
        """Emit loss and gradient of ``output`` (float32 [b, *shape]) and ``targets`` [b, *target(shape)[0]].

        Raises:
            ExportError, UsageError: as ``target``.
        """
        ...


def function_name(base: str, shape: tuple[int, ...], config: LossConfig) -> str:
    """Return a name that differs wherever the body does, within one graph (which has one loss)."""
    parts = [base, "x".join(map(str, shape))]
    if config.label_smoothing:
        parts.append(f"{config.label_smoothing:g}")
    if config.class_weights:
        parts.append("weighted")
    if config.ignore_index is not None:
        parts.append(f"without_{config.ignore_index}")
    return "_".join(parts).replace(".", "p").replace("-", "m")


def shape_text(output: tuple[int, ...]) -> str:
    """Return the shape of one sample's ``output`` as an error message writes it, the batch in front."""
    return f"[{', '.join(['batch', *map(str, output)])}]"


def per_class(values: Array, axes: int) -> Array:
    """Return ``values`` [k] as an array that broadcasts against [b, k, ...] with ``axes`` axes behind the classes."""
    return values.reshape(1, -1, *[1] * axes)


def emit_batch(g: GraphBuilder, output: str, shape: tuple[int, ...]) -> str:
    """Emit the extent of the batch as a float32 scalar, from one element of every sample of ``output``."""
    return str(g.op("ReduceSum", batch_ones(g, output, (0, *shape)), keepdims=0, hint="batch"))
