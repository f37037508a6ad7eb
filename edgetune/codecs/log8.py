"""Any codec with its numbers stored as one byte: a sign and a logarithm. Knows the codec protocol.

Miyashita, Lee, Murmann 2016, "Convolutional Neural Networks using Logarithmic Data Representation", here with eight
steps to an octave. What a transform leaves (a Tucker core, coefficients) spans many orders of magnitude, and a few of
its numbers carry most of the energy: steps of equal ratio are as good for the small ones as for the large ones, and a
tensor needs no other scale than its largest magnitude.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgetune.codecs.base import FACTOR, Array, Emitter, StoredTensor
from edgetune.codecs.dense import Dense
from edgetune.codecs.narrow import Narrow
from edgetune.codecs.quantised import Int8
from edgetune.errors import UsageError

LOG8 = "log8"
_UINT8, _INT32 = 2, 6  # onnx.TensorProto.UINT8 and INT32, which this room may not import
STEPS = 8
"""To an octave."""
TOP, NEGATIVE = 127, 128
TABLE = np.array(
    [0.0 if code % NEGATIVE == 0 else (-1.0) ** (code // NEGATIVE) * 2.0 ** ((code % NEGATIVE - TOP) / STEPS)
     for code in range(256)], np.float32,
)  # fmt: skip
"""What a code stands for, in units of the largest magnitude: 0, and ± 2⁻¹⁵·⁷⁵ to 1."""
LEAST = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Log8(Narrow):
    """Stores a sign and seven bits of logarithm, in units of the largest magnitude.

    Factors stay float32: they are small, and what is off in one of them is off all over the decoded tensor. Another
    element changes by 2^(1/16) - 1 = 4.4 % of its magnitude at most, by 2.5 % in the mean of squares; one below
    2⁻¹⁵·⁸ of the largest becomes zero. The energy is within 0.02 of what is really captured.

    Raises:
        UsageError: ``inner`` is narrowed already, stores the tensor itself (for which int8 is better at the same size)
            or scales of its own, or ``storage`` is not log8.
    """

    storage: str = LOG8

    dtype = "uint8"
    lost = (math.log(2.0) / STEPS) ** 2 / 12
    rounding = 2.0 ** (0.5 / STEPS) - 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.inner, Dense | Int8):
            raise UsageError(f"storage={LOG8} is for what a transform leaves; {self.name} has none, take int8 or int4")
        if self.storage != LOG8:
            raise UsageError(f"storage={self.storage} of the codec {self.name} is no logarithm; expected {LOG8}")

    def narrows(self, tensor: StoredTensor) -> bool:
        """Every float32 tensor but factors."""
        return super().narrows(tensor) and not tensor.name.startswith(FACTOR)

    def rounded(self, value: Array) -> tuple[Array, Array]:
        """Return codes, and the largest magnitude."""
        magnitude = np.abs(value.astype(np.float32))
        unit = np.array([max(float(magnitude.max(initial=0.0)), LEAST)], np.float32)
        with np.errstate(divide="ignore"):
            level = np.log(magnitude * (1 / unit)) * np.float32(STEPS / math.log(2.0)) + np.float32(TOP)
        level = np.clip(np.round(level), 0, TOP)
        return (level + NEGATIVE * (value < 0)).astype(np.uint8), unit

    def widened(self, value: Array, unit: Array) -> Array:
        """Return what the codes stand for."""
        return np.asarray(TABLE[value] * unit)

    def emit_rounded(self, g: Emitter, value: str) -> list[str]:
        """Emit :meth:`rounded`."""
        least = g.op("ReduceMin", value, keepdims=0, hint="least")
        largest = g.op("Max", g.op("ReduceMax", value, keepdims=0, hint="largest"), g.op("Neg", least), g.const(LEAST))
        unit = g.op("Reshape", largest, g.const([1]), hint="unit")
        inverse = g.op("Reciprocal", unit, hint="inverse")
        ratio = g.op("Mul", g.op("Abs", value, hint="magnitude"), inverse, hint="ratio")
        level = g.op("Mul", g.op("Log", ratio, hint="log"), g.const(STEPS / math.log(2.0)), hint="level")
        level = g.op("Round", g.op("Add", level, g.const(float(TOP)), hint="level"), hint="level")
        level = g.op("Clip", level, g.const(0.0), g.const(float(TOP)), hint="level")
        sign = g.op("Cast", g.op("Less", value, g.const(0.0), hint="negative"), to=_UINT8, hint="sign")
        sign = g.op("Mul", sign, g.const(np.array(NEGATIVE, np.uint8)), hint="sign")
        return [g.op("BitwiseOr", g.op("Cast", level, to=_UINT8, hint="level"), sign, hint="code"), unit]

    def emit_widened(self, g: Emitter, value: str, unit: str, hint: str) -> str:
        """Emit one look at the table."""
        place = g.op("Cast", value, to=_INT32, hint="place")
        return str(g.op("Mul", g.op("Gather", g.const(TABLE), place, hint="wide"), unit, hint=hint))
