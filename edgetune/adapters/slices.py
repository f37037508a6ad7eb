"""The arithmetic of CSG: a set of filters as slices, each generated from a code by one shared linear map.

    slice_i = Reshape(A c_i),   W = the slices side by side                        (Omidvar et al. 2021, eq. 1)

A is held transposed, one row per element of a code, so that all slices of a set are one product: [n, n_c]·[n_c, s].
Legend: o filters, c channels, kernel extents as they come (one to three); n slices, s elements of a slice, n_c of a
code. Knows numpy; runs on a device. It is also the oracle of what torch and the exported graphs compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgetune.bundle import Array


@dataclass(frozen=True)
class Slicing:
    """How filters of ``shape`` [o, c, *kernel] are cut into slices of the shape ``slice``, of as many axes.

    Where an extent is no multiple of the slice's, the last slices are generated whole and cut (the paper's second
    footnote). The weight of a grouped convolution [o, c/groups, *kernel] is cut as it stands.
    """

    shape: tuple[int, ...]
    slice: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of slices along each axis."""
        return tuple(-(-extent // part) for extent, part in zip(self.shape, self.slice, strict=True))

    @property
    def slices(self) -> int:
        """The number of slices, n."""
        return math.prod(self.counts)

    @property
    def covered(self) -> tuple[int, ...]:
        """The extents of all slices side by side, before what stands over is cut off."""
        return tuple(count * part for count, part in zip(self.counts, self.slice, strict=True))

    @property
    def apart(self) -> tuple[int, ...]:
        """The shape of n slices in order, as axes (count of each axis, then extent of each axis)."""
        return (*self.counts, *self.slice)

    @property
    def interleaved(self) -> tuple[int, ...]:
        """The permutation of ``apart`` that puts every count beside the extent of its axis."""
        rank = len(self.shape)
        return tuple(axis for i in range(rank) for axis in (i, rank + i))

    def shrinks(self, code: int) -> bool:
        """Whether the codes of ``code`` elements are fewer numbers than the weights that they generate."""
        return self.slices * code < math.prod(self.shape)


def expand(codes: Array, shared_map: Array, shape: Sequence[int], slice_shape: Sequence[int]) -> Array:
    """Return the filters ``shape`` that ``codes`` [n, n_c] and ``shared_map`` [n_c, s] generate."""
    cut = Slicing(tuple(shape), tuple(slice_shape))
    parts = (codes @ shared_map).reshape(cut.apart)
    whole = parts.transpose(cut.interleaved).reshape(cut.covered)
    return np.asarray(whole[tuple(slice(0, extent) for extent in cut.shape)])


def cut_apart(filters: Array, slice_shape: Sequence[int]) -> Array:
    """Return ``filters`` as rows [n, s], zeros where a slice stands over: the adjoint of putting slices together.

    With G = cut_apart(dW): d codes = G·mapᵀ, d map = codesᵀ·G.
    """
    cut = Slicing(filters.shape, tuple(slice_shape))
    over = [(0, covered - extent) for covered, extent in zip(cut.covered, cut.shape, strict=True)]
    pairs = [extent for pair in zip(cut.counts, cut.slice, strict=True) for extent in pair]
    back = np.argsort(cut.interleaved)
    return np.asarray(np.pad(filters, over).reshape(pairs).transpose(back).reshape(cut.slices, -1))
