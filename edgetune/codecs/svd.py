"""Truncated SVD of the unfolding b × all else (HOSVD paper, eq. 4-5). Knows numpy and the codec protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgetune.codecs.base import Array, Emitter, Encoded, Mode, Saved, Source, StoredTensor, check_finite
from edgetune.codecs.energy import emit_captured_energy
from edgetune.codecs.subspace import emit_top_subspace, top_subspace


@dataclass(frozen=True)
class Svd:
    """Stores U [b, r1] and ΣVᵀ = UᵀX [r1, *shape]: r1·(b + n) elements for samples of n.

    The left singular vectors of the batch mode have no meaning beyond their batch, so they are found in the step.
    """

    name = "svd"
    lossy = True

    def applies(self, saved: Saved) -> bool:
        """To every tensor."""
        return True

    def modes(self, saved: Saved) -> tuple[Mode, ...]:
        """Only the batch mode is cut."""
        return (Mode("b", Source.SKETCH, None, 1, "b"),)

    def stored(self, saved: Saved) -> tuple[StoredTensor, ...]:
        """The factor of the batch mode, and the rest."""
        return StoredTensor("factor", ("batch", "b")), StoredTensor("core", ("b", *saved.shape))

    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return ``factor`` [b, r1] and ``core`` [r1, *shape]."""
        check_finite(x, saved)
        flat = x.reshape(len(x), -1)
        factor = top_subspace(flat @ flat.T, inputs["b"])
        return {"factor": factor, "core": (factor.T @ flat).reshape(-1, *saved.shape)}

    def decode(self, stored: Mapping[str, Array], saved: Saved, inputs: Mapping[str, Array]) -> Array:
        """Return U · (UᵀX)."""
        return np.tensordot(stored["factor"], stored["core"], axes=1)

    def emit_encode(self, g: Emitter, x: str, saved: Saved, inputs: Mapping[str, str]) -> Encoded:
        """Emit the Gram matrix of the batch, its leading subspace, and the projection."""
        flat = g.op("Flatten", x, axis=1, hint="flat")
        gram = g.op("Gemm", flat, flat, transB=1, hint="gram")
        factor = emit_top_subspace(g, gram, inputs["b"])
        rows = g.op("MatMul", g.op("Transpose", factor, perm=[1, 0], hint="factor_t"), flat, hint="rows")
        core = g.op("Reshape", rows, g.const([-1, *saved.shape]), hint="core")
        axes = 1 + len(saved.shape)
        return Encoded((factor, core), {}, emit_captured_energy(g, core, axes, x, axes))

    def emit_decode(self, g: Emitter, encoded: Encoded, saved: Saved) -> str:
        """Emit U · (UᵀX)."""
        factor, core = encoded.stored
        flat = g.op("MatMul", factor, g.op("Flatten", core, axis=1, hint="flat"), hint="decoded_flat")
        return str(g.op("Reshape", flat, g.const([-1, *saved.shape]), hint="decoded"))
