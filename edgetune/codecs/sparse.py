"""The largest coefficients of every sample in an orthonormal basis, stored sparse (DCT/WT/ST paper, sections 3.1-3.3).

What the codecs of that paper share: the multi-level transform of the position axes, the choice of the coefficients, and
how they are stored. Knows numpy and the codec protocol.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np

from edgetune.codecs.base import Array, Emitter, Encoded, Mode, Saved, Source, StoredTensor, check_finite
from edgetune.codecs.energy import TINY

GRID_POINTS = 48
"""At how many counts, at most, calibration measures the energy that is kept."""

LONGEST = 1024
"""The longest axis that is transformed: its matrix, a constant of encoder and decoder, takes 4 MiB in each."""

_VALUE_BYTES = 4
_LEAST = 2.0**-126  # the smallest normal float32
_FLOAT, _UINT8, _INT32, _DOUBLE = 1, 2, 6, 11  # of onnx.TensorProto, which this room may not import


def index_bytes(n: int) -> int:
    """Return how many bytes number ``n`` coefficients: 1 up to 256, 2 up to 65536, then 3, then 4."""
    return max(1, -(-(n - 1).bit_length() // 8))


def most_useful_count(n: int) -> int:
    """Return the most of ``n`` coefficients that take fewer bytes, with their indices, than ``n`` float32; maybe 0."""
    return (_VALUE_BYTES * n - 1) // (_VALUE_BYTES + index_bytes(n))


def count_grid(n: int) -> tuple[int, ...]:
    """Return the counts at which calibration measures a codec whose mode has the size ``n``, ascending.

    At most ``GRID_POINTS`` of them, spaced geometrically from 1 to :func:`most_useful_count`; none where that is 0.
    """
    most = most_useful_count(n)
    if most < 1:
        return ()
    return tuple(int(count) for count in np.unique(np.rint(np.geomspace(1, most, GRID_POINTS)).astype(np.int64)))


class Sparse:
    """Transforms the position axes, keeps the k largest magnitudes of each sample, drops the rest.

    k counts per sample, not over the batch as in the paper: what one sample keeps does not depend on its neighbours,
    and stored shapes know the batch (also a last, short one) by its extent alone.

    The transform is orthonormal for any extent, without padding: a sample of n elements has n coefficients, so k = n
    is exact, and the captured energy is that of the kept coefficients. It has ``levels`` levels. One level multiplies
    every position axis with :meth:`matrix`; the next one goes on with the first ⌈e/2⌉ coefficients of every axis.
    A level in which no axis is longer than one is left out.

    Of equal magnitudes the one with the lower index is kept (TopK of the ONNX standard).
    """

    name: str
    lossy = True
    levels: int

    def matrix(self, extent: int) -> Array:
        """Return the orthonormal float64 matrix [extent, extent] of one level: a row per coefficient, low ones first.

        ``extent`` is at least 2. A codec without levels needs none.
        """
        raise NotImplementedError

    def applies(self, saved: Saved) -> bool:
        """Where one coefficient is less than the tensor and, if there are levels, an axis to transform, none too long.

        Without positions the transform would be the identity, and the codec another name for ``threshold``.
        """
        extents = [saved.shape[axis] for axis in self._axes(saved, saved.shape)]
        return self.most_kept(saved) > 0 and (self.levels == 0 or 1 < max(extents, default=0) <= LONGEST)

    def most_kept(self, saved: Saved) -> int:
        """Return the largest k at which this form is smaller than the dense tensor; 0 if there is none."""
        return most_useful_count(math.prod(saved.shape))

    def modes(self, saved: Saved) -> tuple[Mode, ...]:
        """The count."""
        return (Mode("k", Source.COUNT, math.prod(saved.shape), spectrum=f"{self.name}.k"),)

    def stored(self, saved: Saved) -> tuple[StoredTensor, ...]:
        """The kept coefficients, and the bytes of their indices, the lowest byte first.

        Bytes, because they make an index of 3; and because runtimes cast to and from uint8 everywhere.
        """
        places = ("batch", index_bytes(math.prod(saved.shape)), "k")
        return StoredTensor("values", ("batch", "k")), StoredTensor("indices", places, "uint8")

    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return ``values`` [b, k] and ``indices`` [b, bytes, k], the largest magnitudes first."""
        check_finite(x, saved)
        found = self.coefficients(x, saved)
        places = np.argsort(-np.abs(found), axis=1, kind="stable")[:, : int(inputs["k"][0])]
        values = np.take_along_axis(found, places, axis=1).astype(x.dtype)
        digits = [places // 256**byte % 256 for byte in range(index_bytes(found.shape[1]))]
        return {"values": values, "indices": np.stack(digits, axis=1).astype(np.uint8)}

    def decode(self, stored: Mapping[str, Array], saved: Saved, inputs: Mapping[str, Array]) -> Array:
        """Return the inverse transform of the kept coefficients, zero elsewhere."""
        values, digits = stored["values"], stored["indices"].astype(np.int64)
        places = sum(digits[:, byte] * 256**byte for byte in range(digits.shape[1]))
        found = np.zeros((len(values), math.prod(saved.shape)))
        np.put_along_axis(found, places, values, axis=1)
        return self.inverse(found, saved).astype(values.dtype)

    def coefficients(self, x: Array, saved: Saved) -> Array:
        """Return all coefficients [b, n] of ``x`` [b, *saved.shape] as float64: level by level, the coarsest last."""
        parts, low = [], x.astype(np.float64)
        shapes = self._shapes(saved)
        for level, shape in enumerate(shapes):
            for axis in self._axes(saved, shape):
                low = _along(self.matrix(shape[axis]), low, 1 + axis)
            if level + 1 < len(shapes):
                for axis in self._axes(saved, shape):
                    low, high = np.split(low, [shapes[level + 1][axis]], 1 + axis)
                    parts.append(high)
        return np.concatenate([part.reshape(len(x), -1) for part in (*parts, low)], axis=1)

    def inverse(self, found: Array, saved: Saved) -> Array:
        """Return [b, *saved.shape], of which ``found`` [b, n] are the coefficients."""
        shapes = self._shapes(saved)
        highs = self._highs(saved)
        *parts, low = np.split(found, np.cumsum([math.prod(s) for per_level in highs for s in per_level]), axis=1)
        low = low.reshape(-1, *shapes[-1])
        for level in reversed(range(len(shapes))):
            axes = self._axes(saved, shapes[level])
            if level + 1 < len(shapes):
                for axis, shape in zip(reversed(axes), reversed(highs[level]), strict=True):
                    low = np.concatenate([low, parts.pop().reshape(-1, *shape)], 1 + axis)
            for axis in axes:
                low = _along(self.matrix(shapes[level][axis]).T, low, 1 + axis)
        return low

    def emit_encode(self, g: Emitter, x: str, saved: Saved, inputs: Mapping[str, str]) -> Encoded:
        """Emit :meth:`encode`; beside the coefficients one more tensor of their size is alive at any time."""
        found = self.emit_coefficients(g, x, saved)
        sizes = g.op("Abs", found, hint="sizes")
        # Unsorted: which ones they are matters, their order does not, and a selection is cheaper than a sort.
        kept, places = g.op("TopK", sizes, inputs["k"], axis=1, largest=1, sorted=0, outputs=2, hint="kept")
        values = g.op("GatherElements", found, places, axis=1, hint="values")
        # Before the indices, whose 64-bit forms then have the room of what the energy is computed from.
        energy = _emit_energy(g, kept, sizes, saved)
        return Encoded((values, _emit_indices(g, places, math.prod(saved.shape))), {}, energy)

    def emit_decode(self, g: Emitter, encoded: Encoded, saved: Saved) -> str:
        """Emit :meth:`decode`."""
        values, indices = encoded.stored
        places = _emit_places(g, indices, math.prod(saved.shape))
        # Zeros of the batch's extent, which only a stored tensor knows: a column of them, broadcast.
        column = g.op("Slice", values, g.const([0]), g.const([1]), g.const([1]), hint="column")
        zeros = g.op("Mul", column, g.const(0.0), hint="zeros")
        empty = g.op("Expand", zeros, g.const([1, math.prod(saved.shape)]), hint="empty")
        found = g.op("ScatterElements", empty, places, values, axis=1, hint="coefficients")
        return self._emit_inverse(g, found, saved)

    def emit_coefficients(self, g: Emitter, x: str, saved: Saved) -> str:
        """Emit :meth:`coefficients` of ``x`` [b, *saved.shape]: [b, n]."""
        parts, low = [], x
        shapes, highs = self._shapes(saved), self._highs(saved)
        for level, shape in enumerate(shapes):
            for axis in self._axes(saved, shape):
                low = _emit_along(g, self.matrix(shape[axis]), low, shape, axis)
            if level + 1 < len(shapes):
                for axis, high in zip(self._axes(saved, shape), highs[level], strict=True):
                    halves = g.const([shapes[level + 1][axis], high[axis]])
                    low, part = g.op("Split", low, halves, axis=1 + axis, outputs=2, hint="half")
                    parts.append(g.op("Flatten", part, axis=1, hint="part"))
        parts.append(g.op("Flatten", low, axis=1, hint="coefficients"))
        return parts[0] if len(parts) == 1 else str(g.op("Concat", *parts, axis=1, hint="coefficients"))

    def _emit_inverse(self, g: Emitter, found: str, saved: Saved) -> str:
        shapes, highs = self._shapes(saved), self._highs(saved)
        pieces = [shape for per_level in highs for shape in per_level] + [shapes[-1]]
        parts = [found]
        if len(pieces) > 1:
            sizes = g.const([math.prod(shape) for shape in pieces])
            parts = list(g.op("Split", found, sizes, axis=1, outputs=len(pieces), hint="part"))
        parts = [g.op("Reshape", p, g.const([-1, *s]), hint="part") for p, s in zip(parts, pieces, strict=True)]
        low = parts.pop()
        for level in reversed(range(len(shapes))):
            axes = self._axes(saved, shapes[level])
            if level + 1 < len(shapes):
                for axis in reversed(axes):
                    low = g.op("Concat", low, parts.pop(), axis=1 + axis, hint="joined")
            for axis in axes:
                low = _emit_along(g, self.matrix(shapes[level][axis]).T, low, shapes[level], axis)
        return low

    def _axes(self, saved: Saved, shape: tuple[int, ...]) -> list[int]:
        """Return the axes of ``shape`` that a level transforms: those of positions, where they are longer than one."""
        first, count = 0 if saved.rows else 1, len(saved.positions) if self.levels else 0
        return [axis for axis in range(first, first + count) if shape[axis] > 1]

    def _shapes(self, saved: Saved) -> list[tuple[int, ...]]:
        """Return the shape of what every level transforms."""
        shapes = [saved.shape]
        while len(shapes) < self.levels:
            first = len(saved.shape) - 1 if saved.rows else 0  # the axis of the channels
            halved = tuple(n if axis == first else -(-n // 2) for axis, n in enumerate(shapes[-1]))
            if not self._axes(saved, halved):
                break
            shapes.append(halved)
        return shapes

    def _highs(self, saved: Saved) -> list[list[tuple[int, ...]]]:
        """Return, for every level but the last, the shape of what is split off along each of its axes."""
        found = []
        for now, after in itertools.pairwise(self._shapes(saved)):
            rest, shapes = list(now), []
            for axis in self._axes(saved, now):
                shapes.append((*rest[:axis], now[axis] - after[axis], *rest[axis + 1 :]))
                rest[axis] = after[axis]
            found.append(shapes)
        return found


def _along(matrix: Array, x: Array, axis: int) -> Array:
    """Return the product of ``matrix`` [m, n] with ``x`` along ``axis``, of extent n."""
    return np.moveaxis(np.tensordot(matrix, x, axes=(1, axis)), 0, axis)


def _emit_along(g: Emitter, matrix: Array, x: str, shape: tuple[int, ...], axis: int) -> str:
    """Emit the product of ``matrix`` [n, n] with ``x`` [b, *shape] along ``axis`` of ``shape``, without a transpose."""
    behind = math.prod(shape[axis + 1 :])
    if axis == len(shape) - 1:
        return str(g.op("MatMul", x, g.const(matrix.T.astype(np.float32)), hint="transformed"))
    constant = g.const(matrix.astype(np.float32))
    if axis == len(shape) - 2:
        return str(g.op("MatMul", constant, x, hint="transformed"))
    planes = g.op("Reshape", x, g.const([-1, shape[axis], behind]), hint="planes")
    product = g.op("MatMul", constant, planes, hint="transformed")
    return str(g.op("Reshape", product, g.const([-1, *shape]), hint="transformed"))


def _emit_indices(g: Emitter, places: str, n: int) -> str:
    """Emit the bytes [b, bytes, k] uint8 of ``places`` [b, k] int64. A cast to fewer bits drops the higher ones."""
    digits = []
    for byte in range(index_bytes(n)):
        shifted = g.op("Div", places, g.const([256**byte]), hint="shifted") if byte else places
        digit = g.op("Cast", shifted, to=_UINT8, hint="digit")
        digits.append(g.op("Unsqueeze", digit, g.const([1]), hint="digit"))
    return digits[0] if len(digits) == 1 else str(g.op("Concat", *digits, axis=1, hint="indices"))


def _emit_places(g: Emitter, indices: str, n: int) -> str:
    """Emit the reverse: [b, k] int32."""
    count = index_bytes(n)
    digits = g.op("Split", indices, axis=1, num_outputs=count, outputs=count) if count > 1 else (indices,)
    total = ""
    for byte, digit in enumerate(digits):
        term = g.op("Cast", g.op("Squeeze", digit, g.const([1]), hint="digit"), to=_INT32, hint="term")
        if byte:
            term = g.op("Mul", term, g.const(np.array(256**byte, np.int32)), hint="term")
        total = g.op("Add", total, term, hint="places") if total else term
    return total


def _emit_energy(g: Emitter, kept: str, sizes: str, saved: Saved) -> str:
    """Emit Σ kept² / Σ sizes² of the magnitudes ``kept`` [b, k] and ``sizes`` [b, n]; a scalar, 1 for zeros.

    Both are divided by the largest magnitude, whose square might be no float32. Sums of many float32 would lose the
    fifth digit: those of the kept are of doubles, those of all go one axis after the other.
    """
    largest = g.op("ReduceMax", kept, keepdims=0, hint="largest")
    unit = g.op("Max", largest, g.const(_LEAST), hint="unit")
    share = g.op("Cast", g.op("Div", kept, unit, hint="scaled"), to=_DOUBLE, hint="scaled")
    numerator = g.op("ReduceSumSquare", share, keepdims=0, hint="kept_energy")
    total = g.op("Reshape", g.op("Div", sizes, unit, hint="scaled"), g.const([-1, *saved.shape]), hint="scaled")
    total = g.op("ReduceSumSquare", total, g.const([-1]), keepdims=0, hint="squares")
    for _ in saved.shape:
        total = g.op("ReduceSum", total, g.const([-1]), keepdims=0, hint="square_norm")
    denominator = g.op("Cast", total, to=_DOUBLE, hint="total_energy")
    none = g.const(np.array(TINY, np.float64))
    energy = g.op("Div", g.op("Add", numerator, none), g.op("Add", denominator, none), hint="energy")
    return str(g.op("Cast", energy, to=_FLOAT, hint="energy"))
