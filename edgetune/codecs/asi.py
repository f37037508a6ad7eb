"""Tucker compression whose factors follow the batches: one warm-started subspace iteration per mode and step ("ASI").

For every mode A = the unfolding of the batch itself, as in the published HOSVD, not of what the modes before it left:

    V = A·(Aᵀ·U_before)        U = orth(V)        S = X ×₁U¹ᵀ ×₂U²ᵀ ...

The batch mode follows too, although the samples of one batch have nothing to do with those of the one before.
Knows numpy and the codec protocol.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgetune.codecs.base import Array, Emitter, Source
from edgetune.codecs.batch_tucker import BatchTucker
from edgetune.codecs.subspace import emit_orthonormal_columns, emit_unit_columns, orthonormal_columns


@dataclass(frozen=True)
class Asi(BatchTucker):
    """The factor of a mode is one step of subspace iteration from the factor of the step before, at first a sketch.

    A batch of a rank below r does not determine all columns; there those of the step before stay.
    """

    name = "asi"
    source = Source.CARRIED

    def factor(self, unfolding: Array, given: Array) -> Array:
        """Return an orthonormal basis of A·Aᵀ·U for the ``unfolding`` A and U = ``given``."""
        wide = unfolding.astype(np.float64)
        return orthonormal_columns(wide @ (wide.T @ given), given)

    def emit_factor(self, g: Emitter, unfolding: str, transposed: bool, given: str) -> str:
        """Emit two products and Gram-Schmidt."""
        inside = g.op("Gemm", unfolding, given, transA=int(not transposed), hint="inside")
        image = g.op("Gemm", unfolding, inside, transA=int(transposed), hint="image")
        return emit_orthonormal_columns(g, emit_unit_columns(g, image), emit_unit_columns(g, given))
