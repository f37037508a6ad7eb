"""One bit per element: whether it lies strictly between two bounds. Exact for ReLU and its kin.

Knows numpy and the emitter protocol.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgetune.codecs.base import Array, Emitter

_UINT8, _BOOL = 2, 9  # onnx.TensorProto.UINT8 and BOOL, which this room may not import
_BITS = np.array([1, 2, 4, 8, 16, 32, 64, 128], np.uint8)


@dataclass(frozen=True)
class Interval:
    """The open interval ]low, high[; either bound may be infinite."""

    low: float = 0.0
    high: float = math.inf


POSITIVE = Interval()


def pack(x: Array, interval: Interval = POSITIVE) -> Array:
    """Return [b, ceil(n / 8)] uint8: bit j of byte i tells whether element j·ceil(n/8) + i of a sample is inside."""
    inside = ((x > interval.low) & (x < interval.high)).reshape(len(x), -1)
    padded = np.pad(inside, ((0, 0), (0, -inside.shape[1] % 8))).reshape(len(x), 8, -1)
    return np.asarray(np.sum(padded * _BITS[None, :, None], axis=1, dtype=np.uint8))


def unpack(packed: Array, shape: Sequence[int]) -> Array:
    """Return the boolean mask [b, *shape] that ``packed`` holds."""
    size = math.prod(shape)
    bits = (packed[:, None, :] & _BITS[None, :, None]).astype(bool)
    return bits.reshape(len(packed), -1)[:, :size].reshape(len(packed), *shape)


def emit_inside(g: Emitter, x: str, interval: Interval) -> str:
    """Emit the boolean mask low < x < high."""
    tests = []
    if interval.low > -math.inf:
        tests.append(g.op("Greater", x, g.const(interval.low), hint="above"))
    if interval.high < math.inf:
        tests.append(g.op("Less", x, g.const(interval.high), hint="below"))
    if not tests:
        raise ValueError("an interval without a bound needs no mask")
    return tests[0] if len(tests) == 1 else str(g.op("And", *tests, hint="inside"))


def emit_pack(g: Emitter, x: str, shape: Sequence[int], interval: Interval) -> str:
    """Emit :func:`pack`. An integer product sums the bits: no operator of opset 18 packs them."""
    size = math.prod(shape)
    flat = g.op("Flatten", g.op("Cast", emit_inside(g, x, interval), to=_UINT8, hint="ones"), axis=1, hint="ones")
    if size % 8:
        flat = g.op("Pad", flat, g.const([0, 0, 0, -size % 8]), hint="padded")
    planes = g.op("Reshape", flat, g.const([0, 8, -(-size // 8)]), hint="planes")
    summed = g.op("MatMulInteger", g.const(_BITS[None, :]), planes, hint="bytes")
    return str(g.op("Cast", summed, to=_UINT8, hint="mask"))


def emit_unpack(g: Emitter, packed: str, shape: Sequence[int]) -> str:
    """Emit :func:`unpack`."""
    size = math.prod(shape)
    bits = g.op("BitwiseAnd", packed, g.const(_BITS[None, :, None]), hint="bits")
    flat = g.op("Flatten", g.op("Cast", bits, to=_BOOL, hint="bits"), axis=1, hint="bits")
    if size % 8:
        flat = g.op("Slice", flat, g.const([0]), g.const([size]), g.const([1]), hint="bits")
    return str(g.op("Reshape", flat, g.const([-1, *shape]), hint="inside"))
