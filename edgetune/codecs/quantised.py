"""Per-group affine codes of eight or four bits with stochastic rounding: the quantisation baseline.

Gupta et al. 2015, "Deep Learning with Limited Numerical Precision" (the rounding); Chen et al. 2021, "ActNN: Reducing
Training Memory Footprint via 2-Bit Activation Compressed Training" (the groups). Knows numpy and the codec protocol.

    v = (x - lowest) / scale      code = ⌊v + u⌋      x̂ = lowest + scale · code      u uniform in [0, 1)

E[⌊v + u⌋] = v, so the decoded tensor is unbiased, and |x - x̂| < scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgetune.codecs.base import Array, Emitter, Encoded, Mode, Saved, Source, StoredTensor, check_finite
from edgetune.codecs.energy import TINY, emit_square_norm
from edgetune.errors import DataError, UsageError

_FLOAT, _UINT8 = 1, 2  # onnx.TensorProto.FLOAT and UINT8, which this room may not import
_LEAST_SCALE = float(np.finfo(np.float32).tiny)
"""A constant group has no range; with this scale its codes are zero and nothing is divided by zero."""
_SLACK = 1 + 2.0**-20
"""The scale is this much larger than the range asks for: however v + u is rounded, no code passes the last level."""
_GOLDEN = 0.618034
"""All groups share one vector of noise, and group i adds the fraction of i times this number, modulo one. Each stays
uniform, so nothing is biased; without it the errors of groups that lie alike (64 of 192 channels of every token)
agree, and a weight gradient, which sums them, was 13 times as far off as with independent noise, while with it it was
no farther (measured with four bits, on normal numbers and a gradient whose mean is half its deviation)."""


@dataclass(frozen=True)
class Int8:
    """One byte for each element, and two float32 for each ``group`` of consecutive elements of one sample.

    Of a sample of n elements ⌈n / group⌉ groups of equal length are made; the last one is filled up with copies of the
    last element. With groups of 64 that is 9 bits for an element, with 128 it is 8.5 at an error 1.14 times as large
    (measured on rectified normal numbers).

    Raises:
        UsageError: ``group`` is smaller than 2.
    """

    group: int = 64

    name = "int8"
    lossy = True
    bits = 8

    def __post_init__(self) -> None:
        if self.group < 2:
            raise UsageError(f"group={self.group} of the codec {self.name} is too small; at least 2 elements share one")

    def applies(self, saved: Saved) -> bool:
        """To every tensor."""
        return True

    def modes(self, saved: Saved) -> tuple[Mode, ...]:
        """The noise of the rounding, as long as a group."""
        return (Mode("u", Source.NOISE, self._grid(saved)[1]),)

    def stored(self, saved: Saved) -> tuple[StoredTensor, ...]:
        """The codes (of four bits: two to a byte, the first half of a sample in the lower ones), and what they mean."""
        count, length = self._grid(saved)
        return (
            StoredTensor("codes", ("batch", count * length * self.bits // 8), "uint8"),
            StoredTensor("lowest", ("batch", count)),
            StoredTensor("scale", ("batch", count)),
        )

    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return ``codes`` [b, bytes] uint8, ``lowest`` and ``scale`` [b, groups] float32.

        Raises:
            DataError: ``x`` is not finite, or the range of a group is beyond float32.
        """
        check_finite(x, saved)
        count, length = self._grid(saved)
        flat = x.reshape(len(x), -1).astype(np.float32)
        padding = count * length - flat.shape[1]
        rows = np.pad(flat, ((0, 0), (0, padding)), mode="edge").reshape(len(x), count, length)
        lowest = rows.min(axis=2, keepdims=True)
        with np.errstate(over="ignore"):
            extent = rows.max(axis=2, keepdims=True) - lowest
        if not np.isfinite(extent).all():
            raise DataError(f"the range of the activation '{saved.name}' is beyond float32; look for exploding values")
        scale = np.maximum(extent * np.float32(_SLACK / self._levels), np.float32(_LEAST_SCALE))
        start = np.arange(count, dtype=np.float32) * np.float32(_GOLDEN)
        noise = inputs["u"].astype(np.float32) + (start - np.floor(start))[:, None]
        codes = ((rows - lowest) * (1 / scale) + (noise - np.floor(noise))).astype(np.uint8)
        return {"codes": self._packed(codes), "lowest": lowest[:, :, 0], "scale": scale[:, :, 0]}

    def decode(self, stored: Mapping[str, Array], saved: Saved, inputs: Mapping[str, Array]) -> Array:
        """Return lowest + scale · code."""
        count, length = self._grid(saved)
        codes = self._unpacked(stored["codes"]).reshape(-1, count, length)
        rows = codes * stored["scale"][:, :, None] + stored["lowest"][:, :, None]
        return rows.reshape(len(rows), -1)[:, : math.prod(saved.shape)].reshape(-1, *saved.shape)

    def emit_encode(self, g: Emitter, x: str, saved: Saved, inputs: Mapping[str, str]) -> Encoded:
        """Emit ``encode``; besides ``x`` no more than three tensors of its size are alive at once."""
        count, length = self._grid(saved)
        rows = x
        padding = count * length - math.prod(saved.shape)
        if padding:
            flat = g.op("Flatten", x, axis=1, hint="flat")
            rows = g.op("Pad", flat, g.const([0, 0, 0, padding]), mode="edge", hint="padded")
        rows = g.op("Reshape", rows, g.const([-1, count, length]), hint="rows")
        lowest = g.op("ReduceMin", rows, g.const([2]), keepdims=1, hint="lowest")
        highest = g.op("ReduceMax", rows, g.const([2]), keepdims=1, hint="highest")
        extent = g.op("Sub", highest, lowest, hint="extent")
        scale = g.op("Mul", extent, g.const(_SLACK / self._levels), hint="scale")
        scale = g.op("Max", scale, g.const(_LEAST_SCALE), hint="scale")
        above = g.op("Sub", rows, lowest, hint="above")
        v = g.op("Mul", above, g.op("Reciprocal", scale, hint="inverse"), hint="v")
        codes = g.op("Cast", g.op("Add", v, _emit_noise(g, inputs["u"], count), hint="dithered"), to=_UINT8)
        lost = g.op("Sub", v, g.op("Cast", codes, to=_FLOAT, hint="levels"), hint="lost")
        lost = _emit_group_norms(g, lost, (count, length), padding)
        energy = _emit_energy(g, x, lost, scale, g.op("Max", highest, g.op("Neg", lowest), hint="largest"), saved)
        flat_codes = self._emit_packed(g, codes, count * length)
        columns = [str(g.op("Flatten", column, axis=1, hint="column")) for column in (lowest, scale)]
        return Encoded((flat_codes, *columns), {}, energy)

    def emit_decode(self, g: Emitter, encoded: Encoded, saved: Saved) -> str:
        """Emit lowest + scale · code."""
        count, length = self._grid(saved)
        codes, lowest, scale = encoded.stored
        codes = g.op("Reshape", self._emit_unpacked(g, codes), g.const([-1, count, length]), hint="codes")
        column = g.const([-1, count, 1])
        rows = g.op("Cast", codes, to=_FLOAT, hint="levels")
        rows = g.op("Mul", rows, g.op("Reshape", scale, column, hint="scale"), hint="scaled")
        rows = g.op("Add", rows, g.op("Reshape", lowest, column, hint="lowest"), hint="rows")
        size = math.prod(saved.shape)
        if count * length > size:
            flat = g.op("Flatten", rows, axis=1, hint="flat")
            rows = g.op("Slice", flat, g.const([0]), g.const([size]), g.const([1]), hint="cut")
        return str(g.op("Reshape", rows, g.const([-1, *saved.shape]), hint="decoded"))

    @property
    def _levels(self) -> int:
        """The largest code."""
        return int(2**self.bits) - 1

    def _grid(self, saved: Saved) -> tuple[int, int]:
        """Return how many groups a sample has, and how long each is."""
        size = math.prod(saved.shape)
        count = -(-size // self.group)
        return count, -(-size // count)

    def _packed(self, codes: Array) -> Array:
        return codes.reshape(len(codes), -1)

    def _unpacked(self, packed: Array) -> Array:
        return packed

    def _emit_packed(self, g: Emitter, codes: str, size: int) -> str:
        return str(g.op("Flatten", codes, axis=1, hint="codes"))

    def _emit_unpacked(self, g: Emitter, packed: str) -> str:
        return packed


@dataclass(frozen=True)
class Int4(Int8):
    """Four bits for each element, and two float32 for each ``group``: 5 bits for an element with groups of 64.

    Raises:
        UsageError: ``group`` is odd or smaller than 2: two codes share a byte.
    """

    name = "int4"
    bits = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group % 2:
            raise UsageError(f"group={self.group} of the codec {self.name} is odd; two codes share a byte")

    def _grid(self, saved: Saved) -> tuple[int, int]:
        count, length = super()._grid(saved)
        return count, length + length % 2

    def _packed(self, codes: Array) -> Array:
        low, high = np.split(codes.reshape(len(codes), -1), 2, axis=1)
        return np.asarray(low | high << np.uint8(4))

    def _unpacked(self, packed: Array) -> Array:
        return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=1)

    def _emit_packed(self, g: Emitter, codes: str, size: int) -> str:
        low, high = g.op("Split", super()._emit_packed(g, codes, size), outputs=2, axis=1, num_outputs=2, hint="half")
        shifted = g.op("BitShift", high, g.const(np.array([4], np.uint8)), direction="LEFT", hint="shifted")
        return str(g.op("BitwiseOr", low, shifted, hint="codes"))

    def _emit_unpacked(self, g: Emitter, packed: str) -> str:
        low = g.op("BitwiseAnd", packed, g.const(np.array([15], np.uint8)), hint="low")
        high = g.op("BitShift", packed, g.const(np.array([4], np.uint8)), direction="RIGHT", hint="high")
        return str(g.op("Concat", low, high, axis=1, hint="codes"))


def _emit_noise(g: Emitter, noise: str, count: int) -> str:
    """Emit the noise of every group of a sample, [groups, length], from that of one."""
    if count == 1:
        return noise
    numbers = g.op("Range", g.const(0.0), g.const(float(count)), g.const(1.0), hint="numbers")
    # A Reshape: behind an Unsqueeze onnx's shape inference takes the column for a row.
    numbers = g.op("Reshape", numbers, g.const([count, 1]), hint="numbers")
    start = _emit_fraction(g, g.op("Mul", numbers, g.const(_GOLDEN), hint="start"))
    return _emit_fraction(g, g.op("Add", noise, start, hint="noise"))


def _emit_fraction(g: Emitter, x: str) -> str:
    return str(g.op("Sub", x, g.op("Floor", x, hint="floor"), hint="fraction"))


def _emit_group_norms(g: Emitter, rows: str, grid: tuple[int, int], padding: int) -> str:
    """Emit the sum of squares of each of the rows [b, *grid], as a column, without the last row's ``padding``."""
    count, length = grid
    norms = g.op("ReduceSumSquare", rows, g.const([2]), keepdims=1, hint="norms")
    if padding:
        bounds = [g.const(values) for values in ([count - 1, length - padding], [count, length], [1, 2])]
        extra = g.op("ReduceSumSquare", g.op("Slice", rows, *bounds), g.const([2]), keepdims=1, hint="extra")
        norms = g.op("Sub", norms, g.op("Pad", extra, g.const([0, count - 1, 0, 0, 0, 0])), hint="norms")
    return str(norms)


def _emit_energy(g: Emitter, x: str, lost: str, scale: str, largest: str, saved: Saved) -> str:
    """Emit 1 - ‖x - x̂‖²/‖x‖² as a scalar; ``lost`` [b, groups, 1] are squared errors in units of ``scale``.

    Both norms are taken in units of the largest magnitude, whose square alone may be beyond float32.
    """
    unit = g.op("ReduceMax", largest, keepdims=0, hint="unit")
    inverse = g.op("Reciprocal", g.op("Max", unit, g.const(_LEAST_SCALE), hint="unit"), hint="inverse")
    steps = g.op("Mul", scale, inverse, hint="steps")
    lost = g.op("ReduceSum", g.op("Mul", lost, g.op("Mul", steps, steps)), keepdims=0, hint="lost")
    total = emit_square_norm(g, g.op("Mul", x, inverse, hint="scaled"), 1 + len(saved.shape))
    share = g.op("Div", lost, g.op("Add", total, g.const(TINY), hint="total"), hint="share")
    return str(g.op("Sub", g.const(1.0), share, hint="energy"))
