"""Truncated higher-order SVD with lazily refreshed bases (HOSVD paper, eq. 6-8 and 18; DESIGN.md section 4).

The bases of c, h and w come from calibration and are run-time inputs: their column count is the rank. The factor of b
is found inside the step, after the other modes are projected, where the matrix is small. Knows numpy and the codec
protocol.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgetune.codecs.base import Array, Emitter, Encoded, Saved
from edgetune.codecs.energy import emit_captured_energy
from edgetune.codecs.subspace import emit_top_subspace, top_subspace


class Hosvd:
    """Stores the core [g, r2, r3, r1, r4] and the batch factor U¹ [b, r1]; the other factors are resident bases.

    Convolution inputs [b, c, h, w] have one channel factor per group. Linear inputs [b, c] have modes b and c and the
    core [r1, r2]. A channel mode of extent one per group (depthwise) stays whole.
    """

    name = "hosvd"
    lossy = True

    def letters(self, saved: Saved) -> tuple[str, ...]:
        """b, c (unless depthwise), and every spatial mode longer than one."""
        if len(saved.shape) == 1:
            return ("b", "c")
        channels, height, width = saved.shape
        whole = {"c": channels == saved.groups, "h": height == 1, "w": width == 1}
        return ("b", *(letter for letter, keep in whole.items() if not keep))

    def encode(self, x: Array, saved: Saved, bases: Mapping[str, Array]) -> dict[str, Array]:
        """Return ``factor`` [b, r1] and ``core`` [g, r2, r3, r1, r4] ([r1, r2] for a linear input)."""
        if len(saved.shape) == 1:
            projected = x @ bases["c"][0]
            factor = top_subspace(projected @ projected.T, bases["b"])
            return {"factor": factor, "core": factor.T @ projected}
        channel, height, width = _whole_bases(saved, bases)
        grouped = x.reshape(len(x), saved.groups, -1, *saved.shape[1:])
        projected = np.einsum("bgchw,gcp,hq,ws->bgpqs", grouped, channel, height, width, optimize=True)
        flat = projected.reshape(len(x), -1)
        factor = top_subspace(flat @ flat.T, bases["b"])
        return {"factor": factor, "core": np.einsum("ba,bgpqs->gpqas", factor, projected)}

    def decode(self, stored: Mapping[str, Array], saved: Saved, bases: Mapping[str, Array]) -> Array:
        """Return S ×₁U¹ ×₂U² ×₃U³ ×₄U⁴ (eq. 18)."""
        if len(saved.shape) == 1:
            return np.asarray(stored["factor"] @ stored["core"] @ bases["c"][0].T)
        channel, height, width = _whole_bases(saved, bases)
        decoded = np.einsum(
            "gpqas,ba,gcp,hq,ws->bgchw", stored["core"], stored["factor"], channel, height, width, optimize=True
        )
        return np.asarray(decoded.reshape(-1, *saved.shape))

    def emit_encode(self, g: Emitter, x: str, saved: Saved, bases: Mapping[str, str]) -> Encoded:
        """Emit the projections c, h, w (each a product with no transposed copy), then b."""
        if len(saved.shape) == 1:
            projected = g.op("MatMul", x, _matrix(g, bases["c"], saved.shape[0]), hint="projected")
            flat = projected
        else:
            projected = _emit_project(g, x, saved, bases)
            flat = g.op("Flatten", projected, axis=1, hint="flat")
        factor = emit_top_subspace(g, g.op("Gemm", flat, flat, transB=1, hint="gram"), bases["b"])
        transposed = g.op("Transpose", factor, perm=[1, 0], hint="factor_t")
        if len(saved.shape) > 1:
            projected = g.op("Transpose", projected, perm=[1, 2, 3, 0, 4], hint="batch_last")
        core = g.op("MatMul", transposed, projected, hint="core")
        axes = 1 + len(saved.shape)
        energy = emit_captured_energy(g, core, 5 if axes == 4 else axes, x, axes)
        return Encoded((factor, core), {k: v for k, v in bases.items() if k != "b"}, energy)

    def emit_decode(self, g: Emitter, encoded: Encoded, saved: Saved) -> str:
        """Emit eq. 18."""
        factor, core = encoded.stored
        if len(saved.shape) == 1:
            basis = g.op("Transpose", _matrix(g, encoded.bases["c"], saved.shape[0]), perm=[1, 0], hint="basis_t")
            return str(g.op("MatMul", factor, g.op("MatMul", core, basis, hint="features"), hint="decoded"))
        spatial = self.emit_spatial(g, encoded, saved)  # [r1, g, r2, h, w]
        if "c" in encoded.bases:
            flat = g.op("Reshape", spatial, g.const([0, saved.groups, -1, saved.shape[1] * saved.shape[2]]))
            spatial = g.op("MatMul", encoded.bases["c"], flat, hint="channels")
        rows = g.op("MatMul", factor, g.op("Flatten", spatial, axis=1, hint="flat"), hint="decoded_flat")
        return str(g.op("Reshape", rows, g.const([-1, *saved.shape]), hint="decoded"))

    def emit_spatial(self, g: Emitter, encoded: Encoded, saved: Saved) -> str:
        """Emit Z3[r1, g, r2, h, w] = Σ_r3,r4 S · U³ · U⁴ (eq. 21-22): the decoded tensor but for b and c."""
        z = encoded.stored[1]
        if "w" in encoded.bases:
            z = g.op("MatMul", z, g.op("Transpose", encoded.bases["w"], perm=[0, 2, 1], hint="w_t"), hint="z2")
        z = g.op("Transpose", z, perm=[3, 0, 1, 2, 4], hint="z2")
        if "h" in encoded.bases:
            z = g.op("MatMul", encoded.bases["h"], z, hint="z3")
        return str(z)


def _matrix(g: Emitter, basis: str, size: int) -> str:
    """Return the basis [1, size, r] as a matrix [size, r]."""
    return str(g.op("Reshape", basis, g.const([size, -1]), hint="basis"))


def _whole_bases(saved: Saved, bases: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    """Return U² [g, c, r2], U³ [h, r3], U⁴ [w, r4], with a unit matrix for every mode that stays whole."""
    channels, height, width = saved.shape
    ones = np.ones((saved.groups, channels // saved.groups, 1), np.float32)
    channel = bases.get("c", ones)
    return (
        channel,
        bases["h"][0] if "h" in bases else np.eye(height, dtype=np.float32),
        bases["w"][0] if "w" in bases else np.eye(width, dtype=np.float32),
    )


def _emit_project(g: Emitter, x: str, saved: Saved, bases: Mapping[str, str]) -> str:
    """Emit X ×₂U²ᵀ ×₃U³ᵀ ×₄U⁴ᵀ as [b, g, r2, r3, r4]."""
    channels, height, width = saved.shape
    if "c" in bases:
        grouped = g.op(
            "Reshape", x, g.const([0, saved.groups, channels // saved.groups, height * width]), hint="grouped"
        )
        transposed = g.op("Transpose", bases["c"], perm=[0, 2, 1], hint="c_t")
        x = g.op("MatMul", transposed, grouped, hint="project_c")
    projected = g.op("Reshape", x, g.const([0, saved.groups, -1, height, width]), hint="planes")
    if "h" in bases:
        transposed = g.op("Transpose", bases["h"], perm=[0, 2, 1], hint="h_t")
        projected = g.op("MatMul", transposed, projected, hint="project_h")
    if "w" in bases:
        projected = g.op("MatMul", projected, bases["w"], hint="project_w")
    return str(projected)
