"""The leading eigenvectors of a symmetric matrix, exactly: what a truncated SVD of an unfolding is made of.

ONNX has no eigen operator, so the emitted form is Hestenes' one-sided Jacobi method: pairs of rows are rotated until
all rows are orthogonal. The pairs (i, k-i mod n) are disjoint, so one round rotates them at once, and n rounds meet
every pair (a modulus ordering; Golub & Van Loan, 4th edition, section 8.5, on Jacobi in parallel). Knows numpy and the
emitter protocol.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgetune.codecs.base import Array, Emitter
from edgetune.codecs.subspace import TINY, emit_orthonormal_columns, emit_unit_columns

SWEEPS = 10
# Eigenvalues that differ by less than this part of the largest one are the same in float32.
NOISE = 1e-6
_INT64, _FLOAT = 7, 1  # onnx.TensorProto.INT64 and FLOAT, which this room may not import


def leading_eigenvectors(gram: Array, count: int) -> Array:
    """Return the eigenvectors [n, count] of ``gram`` [n, n] with the largest eigenvalues, the largest first."""
    vectors = np.linalg.eigh(gram.astype(np.float64))[1]
    return np.ascontiguousarray(vectors[:, ::-1][:, :count])


def emit_leading_eigenvectors(g: Emitter, gram: str, sketch: str) -> str:
    """Emit :func:`leading_eigenvectors` for as many vectors as ``sketch`` [n, r] has columns: [n, r].

    ``gram`` is positive semidefinite. The result is orthonormal whatever the spectrum: where nothing is left to find,
    the columns of the sketch, which are random, complete it.
    """
    # Scaled, so that the squares of the rows are far from the limits of float32.
    largest = g.op("ReduceMax", g.op("Abs", gram, hint="magnitudes"), keepdims=1, hint="largest")
    scaled = g.op("Div", gram, g.op("Max", largest, g.const(TINY), hint="largest"), hint="scaled")
    ones = g.op("ReduceSum", g.op("EyeLike", gram, dtype=_FLOAT, hint="units"), g.const([1]), keepdims=0, hint="ones")
    numbers = g.op("CumSum", ones, g.const(np.array(0)), exclusive=1, hint="numbers")
    turns = g.op("Concat", *[numbers] * SWEEPS, axis=0, hint="turns")
    rows, numbers = g.scan(_rotate_pairs, [(scaled, 2), (numbers, 1)], [(turns, 0)], hint="orthogonal")
    # A row is now an eigenvector times its eigenvalue.
    values = g.op("ReduceL2", rows, g.const([1]), keepdims=1, hint="eigenvalues")
    vectors = g.op("Div", rows, g.op("Max", values, g.const(TINY), hint="norms"), hint="vectors")
    taken = _emit_selection(g, values, numbers, sketch)
    leading = _emit_refined(g, scaled, vectors, values, taken)
    return emit_orthonormal_columns(g, leading, emit_unit_columns(g, sketch))


def _rotate_pairs(g: Emitter, states: Sequence[str], row: Sequence[str]) -> Sequence[str]:
    """Rotate each row i and row k-i mod n so that they are orthogonal; ``row`` holds k.

    Each row computes its own half of the rotation. Both halves come from the same numbers, with d of the other sign.
    """
    (rows, numbers), (turn,) = states, row
    # A negative index counts from the end, which is what the modulus asks for.
    partner = g.op("Cast", g.op("Sub", turn, numbers), to=_INT64)
    others = g.op("Gather", rows, partner, axis=0)
    own = g.op("ReduceSumSquare", rows, g.const([1]), keepdims=1)
    product = g.op("ReduceSum", g.op("Mul", rows, others), g.const([1]), keepdims=1)
    d = g.op("Sub", g.op("Gather", own, partner, axis=0), own)
    # Equal norms: the numbers of the rows decide which of them turns which way. A row without partner stays as it is.
    distance = g.op("Sub", g.op("Gather", numbers, partner, axis=0), numbers)
    d = g.op("Add", d, g.op("Mul", g.op("Unsqueeze", distance, g.const([1])), g.const(TINY)))
    doubled = g.op("Add", product, product)
    hypotenuse = g.op("Sqrt", g.op("Add", g.op("Mul", d, d), g.op("Mul", doubled, doubled)))
    denominator = g.op("Max", g.op("Add", g.op("Abs", d), hypotenuse), g.const(TINY))
    tangent = g.op("Div", g.op("Mul", g.op("Sign", d), doubled), denominator)
    one = g.const(1.0)
    cosine = g.op("Div", one, g.op("Sqrt", g.op("Add", g.op("Mul", tangent, tangent), one)))
    sine = g.op("Mul", tangent, cosine)
    rotated = g.op("Sub", g.op("Mul", rows, cosine), g.op("Mul", others, sine))
    return [rotated, g.op("Identity", numbers)]


def _emit_refined(g: Emitter, gram: str, vectors: str, values: str, taken: str) -> str:
    """Emit the ``vectors`` [n, n] (rows) that are ``taken`` [n, r], as columns [n, r], after one Newton step.

    Thousands of rotations have left rounding errors. To first order the eigenvector next to x_i is

        x_i + Σ_j x_j · x_jᵀ(G - λ_i)x_i / (λ_i - λ_j)

    where a difference that is rounding noise counts as none.
    """
    rows = g.op("Gemm", taken, vectors, transA=1, hint="leading")
    own = g.op("Gemm", taken, values, transA=1, hint="leading_values")
    residual = g.op(
        "Sub", g.op("MatMul", rows, gram, hint="image"), g.op("Mul", rows, own, hint="image"), hint="residual"
    )
    overlap = g.op("Gemm", residual, vectors, transB=1, hint="overlap")
    difference = g.op("Sub", own, g.op("Transpose", values, perm=[1, 0], hint="values_t"), hint="difference")
    noise = g.op("Mul", g.op("ReduceMax", values, keepdims=1, hint="largest"), g.const(NOISE), hint="noise")
    squares = g.op("Add", g.op("Mul", difference, difference), g.op("Mul", noise, noise), hint="squares")
    squares = g.op("Max", squares, g.const(TINY), hint="squares")
    step = g.op("Mul", overlap, g.op("Div", difference, squares, hint="inverse"), hint="step")
    refined = g.op("Add", rows, g.op("MatMul", step, vectors, hint="moved"), hint="refined")
    return str(g.op("Transpose", refined, perm=[1, 0], hint="refined_t"))


def _emit_selection(g: Emitter, values: str, numbers: str, sketch: str) -> str:
    """Emit [n, r] of zeros and ones that takes the rows with the r largest ``values`` [n, 1], in falling order.

    A TopK would need r as a number, which only an operator of the kind Shape could tell.
    """
    column = g.op("Unsqueeze", numbers, g.const([1]), hint="number")
    turned = g.op("Transpose", values, perm=[1, 0], hint="values_t")
    larger = g.op("Cast", g.op("Less", values, turned, hint="larger"), to=_FLOAT, hint="larger")
    earlier = g.op("Less", g.op("Transpose", column, perm=[1, 0], hint="number_t"), column, hint="earlier")
    tied = g.op("And", g.op("Equal", values, turned, hint="equal"), earlier, hint="tied")
    before = g.op("Add", larger, g.op("Cast", tied, to=_FLOAT, hint="tied"), hint="before")
    place = g.op("ReduceSum", before, g.const([1]), keepdims=1, hint="place")
    norms = g.op("ReduceL2", sketch, g.const([0]), keepdims=1, hint="sketch_norms")
    wanted = g.op("CumSum", g.op("Div", norms, norms, hint="ones"), g.const(np.array(1)), exclusive=1, hint="wanted")
    return str(g.op("Cast", g.op("Equal", place, wanted, hint="taken"), to=_FLOAT, hint="taken"))
