"""Orthonormal bases found inside a step: of given columns, and of the leading subspace of a small Gram matrix.

ONNX has no QR, SVD or eigen operator. The leading subspace is found by matrix products alone: the polar factor of a
matrix of full rank is a basis of its columns, and polynomials in YᵀY converge to it. Given columns, which may depend on
one another, go through Gram-Schmidt in a Scan, one at a time. Halko, Martinsson & Tropp 2011, algorithm 4.4 (randomised
subspace iteration); Amsel, Persson, Musco & Gower 2025, "The Polar Express" (the polynomials). Knows numpy and the
emitter protocol.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgetune.codecs.base import Array, Emitter

ROUNDS = 3
# Added to every eigenvalue of the Gram matrix, which has a Frobenius norm of one: a product with it then leaves no
# column without a direction of its own, whatever the rank of the batch. Far above what float32 rounds away, and far
# below the eigenvalue of any sample that counts.
SHIFT = 3e-5
TINY = 1e-30
# Of a unit column that depends on those before it, float32 leaves no more than this.
DEPENDENT = 1e-6
_FLOAT = 1  # onnx.TensorProto.FLOAT, which this room may not import
# Y ← a·Y + b·Y·(YᵀY) + c·Y·(YᵀY)²: singular values from WEAKEST to 1 come to within 1e-7 of 1. Each triple is the best
# odd polynomial of degree five for what the one before it leaves, at least 0.024 of the largest, and all but the last
# two are divided by 1.01 in their argument, lest rounding carries a value out of the interval.
WEAKEST = 2e-7
POLAR = (
    (8.2398775, -23.0018211, 16.5331638),
    (4.1199314, -2.8752274, 0.5166622),
    (4.1198979, -2.8752185, 0.5166633),
    (4.1197600, -2.8751834, 0.5166680),
    (4.1191919, -2.8750377, 0.5166868),
    (4.1168534, -2.8744387, 0.5167649),
    (4.1072557, -2.8719862, 0.5170889),
    (4.0683325, -2.8621395, 0.5184626),
    (3.9179440, -2.8257763, 0.5247708),
    (3.3204363, -2.4407343, 0.4881186),
    (2.3171646, -1.6541660, 0.4021267),
    (1.8975594, -1.2748440, 0.3774929),
    (1.8750039, -1.2500043, 0.3750004),
)
# So many of them bring all to between 0.1 and 2, which is enough before the next product.
EVEN = 9


def top_subspace(gram: Array, sketch: Array) -> Array:
    """Return an orthonormal basis [b, r] close to the ``r`` leading eigenvectors of ``gram`` [b, b].

    ``sketch`` [b, r] is a random matrix of full rank, r <= b. The result is orthonormal whatever the spectrum.
    """
    wide = gram.astype(np.float64)
    shifted = wide / max(float(np.linalg.norm(wide)), TINY) + SHIFT * np.eye(len(wide))
    basis = sketch.astype(np.float64)
    for _ in range(ROUNDS):
        basis = np.linalg.qr(shifted @ basis)[0]
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
    """Emit :func:`top_subspace`; return the name of the basis [b, r].

    The span is that of the oracle, but not its columns: they are the polar factor of the last product, not its Q.
    """
    # Scaled by the largest element first, lest the squares overflow. What is not finite stays so.
    largest = g.op("Max", g.op("ReduceMax", gram, keepdims=0, hint="largest"), g.const(TINY), hint="largest")
    scaled = g.op("Div", gram, largest, hint="scaled")
    norm = g.op("Max", g.op("ReduceL2", scaled, keepdims=0, hint="norm"), g.const(TINY), hint="norm")
    shift = g.op("Mul", g.op("EyeLike", gram, dtype=_FLOAT, hint="units"), g.const(SHIFT), hint="shift")
    shifted = g.op("Add", g.op("Div", scaled, norm, hint="scaled"), shift, hint="shifted")
    # No singular value exceeds the Frobenius norm.
    y = g.op("Div", sketch, g.op("ReduceL2", sketch, keepdims=0, hint="sketch_norm"), hint="sketch_unit")
    # Singular values of at most 2, times a matrix of norm 1 + SHIFT: halved, and a little less for the rounding.
    half = g.op("Mul", shifted, g.const(0.49), hint="half")
    for _ in range(ROUNDS):
        y = g.op("MatMul", half, _emit_polar(g, y, POLAR[:EVEN]), hint="image")
    return _emit_polar(g, y, POLAR)


def _emit_polar(g: Emitter, y: str, steps: Sequence[tuple[float, float, float]]) -> str:
    """Emit ``y`` [n, r] with the singular values that ``steps`` make of its own, which are at most one."""
    for a, b, c in steps:
        square = g.op("Gemm", y, y, transA=1, hint="square")
        inner = g.op("Gemm", square, square, square, alpha=c, beta=b, hint="inner")
        y = g.op("Gemm", y, inner, y, beta=a, hint="even")
    return y


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
