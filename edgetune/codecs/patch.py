"""Means of small patches of positions, after the gradient filter. Knows numpy and the codec protocol.

Yang, Li and Marculescu, "Efficient On-device Training via Gradient Filtering", CVPR 2023, replace every patch of R × R
positions by one value, in the activation and in the gradient alike. Here only the stored activation is averaged: dX is
computed from the whole gradient, so that no error travels to another layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgetune.codecs.base import Array, Emitter, Encoded, Mode, Saved, StoredTensor, check_finite
from edgetune.codecs.energy import emit_captured_energy
from edgetune.errors import UsageError


@dataclass(frozen=True)
class Patch:
    """Stores the mean over patches of ``size`` positions along every position axis, edge patches over what is there.

    Decoding repeats it. Of n positions along an axis ⌈n / size⌉ values are kept; a shorter axis is one patch. It is an
    orthogonal projection.

    Raises:
        UsageError: ``size`` is smaller than 2.
    """

    size: int = 2

    name = "patch"
    lossy = True

    def __post_init__(self) -> None:
        if self.size < 2:
            raise UsageError(f"size={self.size} of the codec {self.name} is too small; a patch has 2 positions or more")

    def applies(self, saved: Saved) -> bool:
        """Where there is a position axis longer than one."""
        return any(n > 1 for n in saved.positions)

    def modes(self, saved: Saved) -> tuple[Mode, ...]:
        """Nothing is decided at run time."""
        return ()

    def stored(self, saved: Saved) -> tuple[StoredTensor, ...]:
        """The means, laid out as the tensor."""
        counts = tuple(-(-n // self.size) for n in saved.positions)
        shape = (*counts, saved.channels) if saved.channels_last else (saved.channels, *counts)
        return (StoredTensor("means", ("batch", *shape)),)

    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return ``means``, in the layout of ``x``."""
        check_finite(x, saved)
        for axis, n in self._axes(saved):
            starts = np.arange(0, n, self.size)
            counts = np.minimum(n - starts, self.size).astype(x.dtype)
            x = np.add.reduceat(x, starts, axis=axis) / _along(counts, axis, x.ndim)
        return {"means": x}

    def decode(self, stored: Mapping[str, Array], saved: Saved, inputs: Mapping[str, Array]) -> Array:
        """Return every mean at all positions of its patch."""
        x = stored["means"]
        for axis, n in self._axes(saved):
            x = np.take(x, np.arange(n) // self.size, axis=axis)
        return x

    def emit_encode(self, g: Emitter, x: str, saved: Saved, inputs: Mapping[str, str]) -> Encoded:
        """Emit the pooling; an orthonormal basis has the means times the root of what they count."""
        means = (self._emit_pool_rows if saved.rows else self._emit_pool_planes)(g, x, saved)
        weight = np.ones([1] * (1 + len(saved.shape)), np.float32)
        for axis, n in self._axes(saved):
            counts = np.minimum(n - np.arange(0, n, self.size), self.size)
            weight = weight * _along(np.sqrt(counts).astype(np.float32), axis, weight.ndim)
        coefficients = g.op("Mul", means, g.const(weight), hint="coefficients")
        return Encoded((means,), {}, emit_captured_energy(g, coefficients, weight.ndim, x, weight.ndim))

    def emit_decode(self, g: Emitter, encoded: Encoded, saved: Saved) -> str:
        """Emit the repetition, and cut off what edge patches have too much."""
        axes = self._axes(saved)
        scales = np.ones(1 + len(saved.shape), np.float32)
        scales[[axis for axis, _ in axes]] = [self._span(n) for _, n in axes]
        decoded = g.op(
            "Resize", encoded.stored[0], "", g.const(scales), hint="decoded",
            mode="nearest", nearest_mode="floor", coordinate_transformation_mode="asymmetric",
        )  # fmt: skip
        cut = [(axis, n) for axis, n in axes if n % self._span(n)]
        if cut:
            ends, over = [n for _, n in cut], [axis for axis, _ in cut]
            decoded = g.op("Slice", decoded, g.const([0] * len(cut)), g.const(ends), g.const(over), hint="decoded")
        return str(decoded)

    def _emit_pool_planes(self, g: Emitter, x: str, saved: Saved) -> str:
        """Emit the means of a convolution's input."""
        return _emit_means(g, x, saved.positions, [self._span(n) for n in saved.positions])

    def _emit_pool_rows(self, g: Emitter, x: str, saved: Saved) -> str:
        """Emit the means of a linear layer's input, one axis after the other, as images of one channel."""
        extents = [-1, *saved.shape]
        for axis, n in self._axes(saved):
            behind = math.prod(extents[axis + 1 :])
            image = g.op("Reshape", x, g.const([-1, 1, n, behind]), hint="image")
            x = _emit_means(g, image, [n, behind], [self._span(n), 1])
            extents[axis] = -(-n // self._span(n))
        return str(g.op("Reshape", x, g.const(extents), hint="means"))

    def _axes(self, saved: Saved) -> list[tuple[int, int]]:
        """Return (axis, extent) of every position axis longer than one, counted with the batch."""
        first = 1 if saved.channels_last else 2
        return [(first + i, n) for i, n in enumerate(saved.positions) if n > 1]

    def _span(self, extent: int) -> int:
        return min(self.size, extent)


def _emit_means(g: Emitter, x: str, extents: Sequence[int], spans: Sequence[int]) -> str:
    """Emit the means over windows of ``spans`` side by side; padding does not count."""
    ends = [-n % span for n, span in zip(extents, spans, strict=True)]
    return str(g.op("AveragePool", x, kernel_shape=spans, strides=spans, pads=[0] * len(ends) + ends, hint="means"))


def _along(values: Array, axis: int, axes: int) -> Array:
    """Return ``values`` shaped so that they multiply along ``axis`` of ``axes``."""
    return values.reshape([-1 if i == axis else 1 for i in range(axes)])
