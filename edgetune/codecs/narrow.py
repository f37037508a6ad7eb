"""Any codec with its numbers stored in fewer bytes, in units of one number for each tensor. Knows the codec protocol.

What all such storages have in common, and float16: half the bytes, eleven significant bits. ``codecs/log8.py`` has one
byte.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
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
class Narrow(ABC):
    """Stores float32 tensors of ``inner`` in fewer bytes, each in units of a number of its own, ``<name>_unit`` [1].

    Other types are stored as they are. The energy is that of ``inner``, less what rounding loses on average
    (:attr:`lost`); where ``inner`` loses nothing it is computed. The name is that of ``inner``.
    """

    inner: Codec
    storage: str

    name = ""
    lossy = True
    dtype = FLOAT32
    """In which the numbers are stored."""
    lost = 0.0
    """The mean share of the energy of a stored tensor that rounding loses."""

    def __post_init__(self) -> None:
        if isinstance(self.inner, Narrow):
            raise UsageError(f"{self.inner.name} is stored as {self.inner.storage} already")
        object.__setattr__(self, "name", self.inner.name)

    def narrows(self, tensor: StoredTensor) -> bool:
        """Tell whether ``tensor`` of the inner codec is stored in fewer bytes."""
        return tensor.dtype == FLOAT32

    @abstractmethod
    def rounded(self, value: Array) -> tuple[Array, Array]:
        """Return what stands for ``value``, of its shape, and the unit [1] float32."""

    @abstractmethod
    def widened(self, value: Array, unit: Array) -> Array:
        """Return the float32 that :meth:`rounded` stands for."""

    @abstractmethod
    def emit_rounded(self, g: Emitter, value: str) -> list[str]:
        """Emit :meth:`rounded`."""

    @abstractmethod
    def emit_widened(self, g: Emitter, value: str, unit: str, hint: str) -> str:
        """Emit :meth:`widened`."""

    def applies(self, saved: Saved) -> bool:
        """Where the inner codec does."""
        return self.inner.applies(saved)

    def modes(self, saved: Saved) -> tuple[Mode, ...]:
        """Those of the inner codec."""
        return self.inner.modes(saved)

    def stored(self, saved: Saved) -> tuple[StoredTensor, ...]:
        """The tensors of the inner codec, each float32 one narrowed and followed by its unit."""
        found = []
        for tensor in self.inner.stored(saved):
            if self.narrows(tensor):
                found += [replace(tensor, dtype=self.dtype), StoredTensor(f"{tensor.name}_unit", (1,))]
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
            if self.narrows(tensor):
                check_finite(value, saved)  # squares of huge numbers overflow
                found[tensor.name], found[f"{tensor.name}_unit"] = self.rounded(value)
            else:
                found[tensor.name] = value
        return found

    def decode(self, stored: Mapping[str, Array], saved: Saved, inputs: Mapping[str, Array]) -> Array:
        """Return what the inner codec decodes from the rounded numbers."""
        wide = {
            tensor.name: self.widened(stored[tensor.name], stored[f"{tensor.name}_unit"])
            if self.narrows(tensor)
            else stored[tensor.name]
            for tensor in self.inner.stored(saved)
        }
        return self.inner.decode(wide, saved, inputs)

    def emit_encode(self, g: Emitter, x: str, saved: Saved, inputs: Mapping[str, str]) -> Encoded:
        """Emit the inner encoder, then the rounding."""
        exact = self.inner.emit_encode(g, x, saved, inputs)
        names: list[str] = []
        for tensor, name in zip(self.inner.stored(saved), exact.stored, strict=True):
            names += self.emit_rounded(g, name) if self.narrows(tensor) else [name]
        rounded = replace(exact, stored=tuple(names))
        if exact.energy is None:
            decoded = self.emit_decode(g, rounded, saved)
            return replace(rounded, energy=_emit_energy(g, x, decoded, 1 + len(saved.shape)))
        if self.lost:
            share = (1.0 - self.lost) ** sum(self.narrows(tensor) for tensor in self.inner.stored(saved))
            rounded = replace(rounded, energy=g.op("Mul", exact.energy, g.const(share), hint="energy"))
        return rounded

    def emit_decode(self, g: Emitter, encoded: Encoded, saved: Saved) -> str:
        """Emit the conversion to float32, then the inner decoder."""
        inner, wide = opened(g, self, encoded, saved)
        return inner.emit_decode(g, wide, saved)


@dataclass(frozen=True)
class Half(Narrow):
    """Stores float16 in units of a power of two that follows the largest magnitude: 1e30 survives, and 1e-30.

    An element changes by 2⁻¹¹ of its magnitude at most, or by 2⁻³⁸ of the largest one. The energy is within 1e-3 of
    what is really captured. The dense codec becomes ``fp16``, since for ``dense`` nothing is emitted at all. Of int8
    and int4 the lowest values and scales are rounded after the codes are chosen: so they are no longer unbiased, by
    2⁻¹¹ of the lowest value and of the range of a group at most.

    Raises:
        UsageError: ``inner`` is narrowed already, or ``storage`` is not float16.
    """

    storage: str = FLOAT16

    dtype = FLOAT16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.storage != FLOAT16:
            raise UsageError(f"storage={self.storage} of the codec {self.inner.name} is no half; expected {FLOAT16}")
        if isinstance(self.inner, Dense):
            object.__setattr__(self, "name", "fp16")

    def rounded(self, value: Array) -> tuple[Array, Array]:
        """Return float16, and the power of two in which it counts."""
        largest = max(float(np.abs(value).max(initial=0.0)), _LEAST)
        unit = np.array([2.0 ** (round(math.log2(largest)) - _ROOM)], np.float32)
        return (value / unit).astype(np.float16), unit

    def widened(self, value: Array, unit: Array) -> Array:
        """Return the product."""
        return np.asarray(value.astype(np.float32) * unit)

    def emit_rounded(self, g: Emitter, value: str) -> list[str]:
        """Emit :meth:`rounded`. Largest and least need no tensor of magnitudes."""
        least = g.op("ReduceMin", value, keepdims=0, hint="least")
        largest = g.op("Max", g.op("ReduceMax", value, keepdims=0, hint="largest"), g.op("Neg", least), g.const(_LEAST))
        # To the nearest power: between two of them, where a last digit of the logarithm decides, either will do.
        exponent = g.op("Round", g.op("Div", g.op("Log", largest), g.const(math.log(2.0))), hint="exponent")
        power = g.op("Pow", g.const(2.0), g.op("Sub", exponent, g.const(float(_ROOM))), hint="power")
        unit = g.op("Reshape", power, g.const([1]), hint="unit")
        scaled = g.op("Mul", value, g.op("Reciprocal", unit, hint="inverse"), hint="scaled")
        return [g.op("Cast", scaled, to=_FLOAT16, hint="half"), unit]

    def emit_widened(self, g: Emitter, value: str, unit: str, hint: str) -> str:
        """Emit the product."""
        return str(g.op("Mul", g.op("Cast", value, to=_FLOAT, hint="wide"), unit, hint=hint))


def opened(g: Emitter, codec: Codec, encoded: Encoded, saved: Saved) -> tuple[Codec, Encoded]:
    """Emit what makes float32 of narrower numbers; return the inner codec, and what it would have stored itself.

    So a rule with arithmetic for some codec needs none for its storage. Any other codec is returned as it is.
    """
    if not isinstance(codec, Narrow):
        return codec, encoded
    rest = iter(encoded.stored)
    names = []
    for tensor in codec.inner.stored(saved):
        name = next(rest)
        if codec.narrows(tensor):
            name = codec.emit_widened(g, name, next(rest), tensor.name)
        names.append(name)
    return codec.inner, replace(encoded, stored=tuple(names))


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
