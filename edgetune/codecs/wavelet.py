"""Three-level wavelet transforms, Haar and Daubechies with three vanishing moments (DCT/WT/ST paper, section 3.1.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgetune.codecs.base import Array
from edgetune.codecs.sparse import Sparse

LEVELS = 3
HAAR = np.full(2, math.sqrt(0.5))
_A, _B = math.sqrt(10.0), math.sqrt(5.0 + 2.0 * math.sqrt(10.0))
DB3 = np.array(
    [1 + _A + _B, 5 + _A + 3 * _B, 10 - 2 * _A + 2 * _B, 10 - 2 * _A - 2 * _B, 5 + _A - 3 * _B, 1 + _A - _B]
) / (16.0 * math.sqrt(2.0))
"""The low-pass filter with three vanishing moments, in closed form (Daubechies 1992, Ten Lectures on Wavelets)."""


def level_matrix(low_pass: Array, extent: int) -> Array:
    """Return the orthonormal matrix [extent, extent] of one level of a periodised transform: ⌈n/2⌉ low rows first.

    For even extents it is that of PyWavelets with ``mode="periodization"``. Of an odd extent the last element goes on
    to the low band as it is. (For Haar that is what two copies of it, each 1/√2 as large, would give.)
    """
    taps, half = len(low_pass), extent // 2
    found = np.zeros((extent, extent))
    low, high = found[: extent - half], found[extent - half :]
    for k in range(half):
        for j in range(taps):
            place = (2 * k + j - taps // 2 + 1) % (2 * half)  # short extents wrap more than once: hence the sums
            low[k, place] += low_pass[j]
            high[k, place] += (-1) ** j * low_pass[taps - 1 - j]
    if extent % 2:
        low[half, extent - 1] = 1.0
    return found


class Wavelet(Sparse):
    """What both wavelets share: three levels, over w, over h and w, or over z, h and w.

    Nothing is padded, so that there are as many coefficients as elements. At a tenth of the coefficients of ReLU
    activations (14 × 14) db3 keeps 0.943 of the energy so; padded to the next multiple of 8 it keeps 0.927 with zeros
    and 0.942 with repeated edges.
    """

    levels = LEVELS


@dataclass(frozen=True)
class Haar(Wavelet):
    """The Haar wavelet."""

    name = "haar"

    def matrix(self, extent: int) -> Array:
        """Return one level."""
        return level_matrix(HAAR, extent)


@dataclass(frozen=True)
class Db3(Wavelet):
    """The Daubechies wavelet with three vanishing moments (six taps)."""

    name = "db3"

    def matrix(self, extent: int) -> Array:
        """Return one level."""
        return level_matrix(DB3, extent)
