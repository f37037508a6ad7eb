"""Any codec with its numbers stored as float16: half the bytes, eleven significant bits. Knows the codec protocol."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from edgetune.codecs.base import Array, Codec, Emitter, Encoded, Mode, Saved, StoredTensor, check_finite
from edgetune.codecs.dense import Dense
from edgetune.codecs.energy import TINY, emit_square_norm
from edgetune.errors import UsageError

FLOAT16, FLOAT32 = "float16", "float32"
_FLOAT, _FLOAT16 = 1, 10  # onnx.TensorProto.FLOAT and FLOAT16, which this room may not import
_LEAST = 2.0**-100
"""Smaller magnitudes than this are scaled as if they were this large, so that the scale is never subnormal."""
_ROOM = 14
"""The largest magnitude becomes about 2¹⁴: below float16's 65504, and far above 2⁻²⁴, its least."""


@dataclass(frozen=True)
class Half:
    """Stores every float32 tensor of ``inner`` as float16, in units of a power of two of its own, ``<name>_unit`` [1].

    The unit follows the largest magnitude of the tensor, so that 1e30 survives, and 1e-30. An element changes by 2⁻¹¹
    of its magnitude at most, or by 2⁻³⁸ of the largest one. Other types are stored as they are. The name is that of
    ``inner``; only the dense codec becomes ``fp16``, since for ``dense`` nothing is emitted at all.

    The energy is that of ``inner`` before rounding, which is within 1e-3 of what is really captured; where ``inner``
    loses nothing it is computed. Of int8 and int4 the lowest values and scales are rounded after the codes are chosen:
    so they are no longer unbiased, by 2⁻¹¹ of the lowest value and of the range of a group at most.

    Raises:
        UsageError: ``inner`` is stored as float16 already, or ``storage`` is not float16.
    """

    inner: Codec
    storage: str = FLOAT16

    name = "fp16"
    lossy = True

    def __post_init__(self) -> None:
        if isinstance(self.inner, Half):
            raise UsageError(f"{self.inner.name} is stored as {FLOAT16} already")
        if self.storage != FLOAT16:
            raise UsageError(f"storage={self.storage} of the codec {self.inner.name} is no half; expected {FLOAT16}")
        if not isinstance(self.inner, Dense):
            object.__setattr__(self, "name", self.inner.name)

    def applies(self, saved: Saved) -> bool:
        """Where the inner codec does."""
        return self.inner.applies(saved)

    def modes(self, saved: Saved) -> tuple[Mode, ...]:
        """Those of the inner codec."""
        return self.inner.modes(saved)

    def stored(self, saved: Saved) -> tuple[StoredTensor, ...]:
        """The tensors of the inner codec, each float32 one as float16 and followed by its unit."""
        found = []
        for tensor in self.inner.stored(saved):
            if tensor.dtype == FLOAT32:
                found += [replace(tensor, dtype=FLOAT16), StoredTensor(f"{tensor.name}_unit", (1,))]
            else:
                found.append(tensor)
        return tuple(found)

    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return what the inner codec does, rounded, and the units.

        Raises:
            DataError: ``x`` is not finite, or what the inner codec makes of it is not.
        """
        found: dict[str, Array] = {}
        exact = self.inner.encode(x, saved, inputs)
        for tensor in self.inner.stored(saved):
            value = exact[tensor.name]
            if tensor.dtype == FLOAT32:
                check_finite(value, saved)  # squares of huge numbers overflow
                unit = _unit(value)
                found |= {tensor.name: (value / unit).astype(np.float16), f"{tensor.name}_unit": unit}
            else:
                found[tensor.name] = value
        return found

    def decode(self, stored: Mapping[str, Array], saved: Saved, inputs: Mapping[str, Array]) -> Array:
        """Return what the inner codec decodes from the rounded numbers."""
        wide = {
            tensor.name: stored[tensor.name].astype(np.float32) * stored[f"{tensor.name}_unit"]
            if tensor.dtype == FLOAT32
            else stored[tensor.name]
            for tensor in self.inner.stored(saved)
        }
        return self.inner.decode(wide, saved, inputs)

    def emit_encode(self, g: Emitter, x: str, saved: Saved, inputs: Mapping[str, str]) -> Encoded:
        """Emit the inner encoder, then the rounding."""
        exact = self.inner.emit_encode(g, x, saved, inputs)
        names: list[str] = []
        for tensor, name in zip(self.inner.stored(saved), exact.stored, strict=True):
            names += _emit_rounded(g, name) if tensor.dtype == FLOAT32 else [name]
        rounded = replace(exact, stored=tuple(names))
        if exact.energy is None:
            decoded = self.emit_decode(g, rounded, saved)
            rounded = replace(rounded, energy=_emit_energy(g, x, decoded, 1 + len(saved.shape)))
        return rounded

    def emit_decode(self, g: Emitter, encoded: Encoded, saved: Saved) -> str:
        """Emit the conversion to float32, then the inner decoder."""
        inner, wide = opened(g, self, encoded, saved)
        return inner.emit_decode(g, wide, saved)


def opened(g: Emitter, codec: Codec, encoded: Encoded, saved: Saved) -> tuple[Codec, Encoded]:
    """Emit what makes float32 of stored float16; return the inner codec, and what it would have stored itself.

    So a rule with arithmetic for some codec needs none for its storage. Any other codec is returned as it is.
    """
    if not isinstance(codec, Half):
        return codec, encoded
    rest = iter(encoded.stored)
    names = []
    for tensor in codec.inner.stored(saved):
        name = next(rest)
        if tensor.dtype == FLOAT32:
            name = g.op("Mul", g.op("Cast", name, to=_FLOAT, hint="wide"), next(rest), hint=tensor.name)
        names.append(name)
    return codec.inner, replace(encoded, stored=tuple(names))


def _unit(value: Array) -> Array:
    """Return the power of two [1] in which ``value`` is stored."""
    largest = max(float(np.abs(value).max(initial=0.0)), _LEAST)
    return np.array([2.0 ** (round(math.log2(largest)) - _ROOM)], np.float32)


def _emit_rounded(g: Emitter, value: str) -> list[str]:
    """Emit ``value`` as float16, and its unit [1]. Largest and least need no tensor of magnitudes."""
    least = g.op("ReduceMin", value, keepdims=0, hint="least")
    largest = g.op("Max", g.op("ReduceMax", value, keepdims=0, hint="largest"), g.op("Neg", least), g.const(_LEAST))
    # Rounded to the nearest power: between two of them, where a last digit of the logarithm decides, either will do.
    exponent = g.op("Round", g.op("Div", g.op("Log", largest), g.const(math.log(2.0))), hint="exponent")
    power = g.op("Pow", g.const(2.0), g.op("Sub", exponent, g.const(float(_ROOM))), hint="power")
    unit = g.op("Reshape", power, g.const([1]), hint="unit")
    scaled = g.op("Mul", value, g.op("Reciprocal", unit, hint="inverse"), hint="scaled")
    return [g.op("Cast", scaled, to=_FLOAT16, hint="half"), unit]


def _emit_energy(g: Emitter, x: str, decoded: str, axes: int) -> str:
    """Emit 1 - ‖x - decoded‖²/‖x‖², both in units of the largest magnitude, whose square may be beyond float32."""
    least = g.op("ReduceMin", x, keepdims=0, hint="least")
    largest = g.op("Max", g.op("ReduceMax", x, keepdims=0, hint="largest"), g.op("Neg", least), g.const(_LEAST))
    inverse = g.op("Reciprocal", largest, hint="inverse")

    lost = g.op("Mul", g.op("Sub", x, decoded, hint="lost"), inverse, hint="lost")
    lost = emit_square_norm(g, lost, axes)
    total = emit_square_norm(g, g.op("Mul", x, inverse, hint="scaled"), axes)
    share = g.op("Div", lost, g.op("Add", total, g.const(TINY), hint="total"), hint="share")
    return str(g.op("Sub", g.const(1.0), share, hint="energy"))
