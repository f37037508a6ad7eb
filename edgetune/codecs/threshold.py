"""The largest elements themselves, without a transform (DCT/WT/ST paper, section 3.1.3)."""

from __future__ import annotations

from dataclasses import dataclass

from edgetune.codecs.sparse import Sparse


@dataclass(frozen=True)
class Threshold(Sparse):
    """Keeps the k largest magnitudes of every sample; what it keeps is exact to the bit."""

    name = "threshold"
    levels = 0
