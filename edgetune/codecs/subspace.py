"""Orthonormal bases found inside a step: of given columns, and of the leading subspace of a small Gram matrix.

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
# Of a unit column that depends on those before it, float32 leaves no more than this.
DEPENDENT = 1e-6


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


def orthonormal_columns(matrix: Array, spare: Array) -> Array:
    """Return an orthonormal basis [n, r] of the columns of ``matrix`` [n, r], r <= n: Q of its QR decomposition.

    Where a column depends on those before it, its place in Q is not determined; there the column of ``spare`` [n, r],
    which should have full rank, is taken instead.
    """
    basis = np.zeros(matrix.shape, np.float64)
    for j, (column, other) in enumerate(zip(matrix.T.astype(np.float64), spare.T.astype(np.float64), strict=True)):
        done = basis[:, :j]
        column = column / max(float(np.abs(column).max()), TINY)
        v = column - done @ (done.T @ column)
        if np.linalg.norm(v) <= DEPENDENT * np.linalg.norm(column):
            v = other
        for _ in range(3):
            v = v - done @ (done.T @ v)
            v = v / max(float(np.linalg.norm(v)), TINY)
        basis[:, j] = v
    return basis


def emit_top_subspace(g: Emitter, gram: str, sketch: str) -> str:
    """Emit :func:`top_subspace`; return the name of the basis [b, r]."""
    basis = sketch
    mix = g.op("Mul", emit_unit_columns(g, sketch), g.const(MIX), hint="mix")
    for _ in range(ROUNDS):
        image = emit_unit_columns(g, g.op("MatMul", gram, basis, hint="image"))
        basis = _mixed_columns(g, g.op("Add", image, mix, hint="mixed"))
    return basis


def emit_unit_columns(g: Emitter, matrix: str) -> str:
    """Emit ``matrix`` with columns of norm one; the largest element comes first, lest the squares overflow."""
    magnitudes = g.op("ReduceMax", g.op("Abs", matrix, hint="magnitudes"), g.const([0]), keepdims=1, hint="largest")
    scaled = g.op("Div", matrix, g.op("Max", magnitudes, g.const(TINY), hint="largest"), hint="scaled")
    norms = g.op("ReduceL2", scaled, g.const([0]), keepdims=1, hint="norms")
    return str(g.op("Div", scaled, g.op("Max", norms, g.const(TINY), hint="norms"), hint="unit"))


def emit_orthonormal_columns(g: Emitter, matrix: str, spare: str) -> str:
    """Emit :func:`orthonormal_columns`; the columns of ``matrix`` are zero or of norm one.

    A remainder that is rounding noise need not be orthogonal to what it is a remainder of: then most of it goes when it
    is made orthogonal a second time, which is how such a column is known.
    """
    rows = g.op("Transpose", matrix, perm=[1, 0], hint="rows")
    others = g.op("Transpose", spare, perm=[1, 0], hint="others")
    start = g.op("Sub", matrix, matrix, hint="start")

    def append_column(g: Emitter, states: Sequence[str], row: Sequence[str]) -> Sequence[str]:
        (done,), (column, other, unit) = states, row
        transposed = g.op("Transpose", done, perm=[1, 0])
        v = _emit_unit(g, _emit_remainder(g, done, transposed, g.op("Unsqueeze", column, g.const([1]))))
        again = _emit_remainder(g, done, transposed, v)
        dependent = g.op("Less", g.op("ReduceL2", again, keepdims=1), g.const(0.5))
        v = g.op("Where", dependent, g.op("Unsqueeze", other, g.const([1])), again)
        for _ in range(2):
            v = _emit_unit(g, _emit_remainder(g, done, transposed, _emit_unit(g, v)))
        return [g.op("Add", done, g.op("MatMul", v, g.op("Unsqueeze", unit, g.const([0]))))]

    units = g.op("EyeLike", g.op("MatMul", rows, matrix, hint="square"), dtype=1, hint="units")
    return g.scan(append_column, [(start, 2)], [(rows, 1), (others, 1), (units, 1)], hint="basis")[0]


def _emit_remainder(g: Emitter, done: str, transposed: str, v: str) -> str:
    """Emit what is left of the column ``v`` [n, 1] without its part in the columns ``done``."""
    return str(g.op("Sub", v, g.op("MatMul", done, g.op("MatMul", transposed, v))))


def _emit_unit(g: Emitter, v: str) -> str:
    return str(g.op("Div", v, g.op("Max", g.op("ReduceL2", v, keepdims=1), g.const(TINY))))


def _mixed_columns(g: Emitter, matrix: str) -> str:
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
            v = _emit_unit(g, _emit_remainder(g, done, transposed, v))
        return [g.op("Add", done, g.op("MatMul", v, g.op("Unsqueeze", unit, g.const([0]))))]

    return g.scan(append_column, [(start, 2)], [(rows, 1), (units, 1)], hint="basis")[0]
