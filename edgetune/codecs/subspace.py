"""The factor of the batch mode, found inside a step: a few rounds of subspace iteration on a small Gram matrix.

ONNX has no QR, SVD or eigen operator, so the orthonormalisation is Gram-Schmidt, one column at a time, in a Scan.
Halko, Martinsson & Tropp 2011, algorithm 4.4 (randomised subspace iteration). Knows numpy and the emitter protocol.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgetune.codecs.base import Array, Emitter

ROUNDS = 3
# A column that depends on those before it would leave only rounding noise, which need not be orthogonal to anything.
# A little of the random sketch is mixed into every column, so that its remainder is a direction of its own.
MIX = 1e-5
TINY = 1e-30


def top_subspace(gram: Array, sketch: Array) -> Array:
    """Return an orthonormal basis [b, r] close to the ``r`` leading eigenvectors of ``gram`` [b, b].

    ``sketch`` [b, r] is a random matrix of full rank. The result is orthonormal whatever the spectrum.
    """
    basis = sketch.astype(np.float64)
    mix = sketch / np.linalg.norm(sketch, axis=0)
    for _ in range(ROUNDS):
        image = gram.astype(np.float64) @ basis
        image /= np.maximum(np.linalg.norm(image, axis=0), TINY)
        basis = np.linalg.qr(image + MIX * mix)[0]
    return basis.astype(gram.dtype)


def emit_top_subspace(g: Emitter, gram: str, sketch: str) -> str:
    """Emit :func:`top_subspace`; return the name of the basis [b, r]."""
    basis = sketch
    mix = g.op("Mul", _unit_columns(g, sketch), g.const(MIX), hint="mix")
    for _ in range(ROUNDS):
        image = _unit_columns(g, g.op("MatMul", gram, basis, hint="image"))
        basis = _orthonormal_columns(g, g.op("Add", image, mix, hint="mixed"))
    return basis


def _unit_columns(g: Emitter, matrix: str) -> str:
    norms = g.op("ReduceL2", matrix, g.const([0]), keepdims=1, hint="norms")
    return str(g.op("Div", matrix, g.op("Max", norms, g.const(TINY), hint="norms"), hint="unit"))


def _orthonormal_columns(g: Emitter, matrix: str) -> str:
    """Gram-Schmidt with re-orthogonalisation ("twice is enough", Giraud et al. 2005; a third pass costs nothing)."""
    rows = g.op("Transpose", matrix, perm=[1, 0], hint="rows")
    square = g.op("MatMul", rows, matrix, hint="square")
    units = g.op("EyeLike", square, dtype=1, hint="units")
    start = g.op("Sub", matrix, matrix, hint="start")

    def append_column(g: Emitter, states: Sequence[str], row: Sequence[str]) -> Sequence[str]:
        (done,), (column, unit) = states, row
        transposed = g.op("Transpose", done, perm=[1, 0])
        v = g.op("Unsqueeze", column, g.const([1]))
        for _ in range(3):
            v = g.op("Sub", v, g.op("MatMul", done, g.op("MatMul", transposed, v)))
            v = g.op("Div", v, g.op("Max", g.op("ReduceL2", v, keepdims=1), g.const(TINY)))
        return [g.op("Add", done, g.op("MatMul", v, g.op("Unsqueeze", unit, g.const([0]))))]

    return g.scan(append_column, [(start, 2)], [(rows, 1), (units, 1)], hint="basis")[0]
