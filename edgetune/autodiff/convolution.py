"""Convolutions written as a few large matrix products, where a runtime computes those faster than its own operator.

A runtime without a kernel of its own for a weight that changes (onnxruntime on a CPU) unfolds every image by itself:
thousands of small matrix products. Three forms make large ones of them:

    pointwise   a kernel of one tap: one batched product
    depthwise   one small matrix per channel, from all input positions to all output positions
    winograd    3 × 3 taps, stride 1: F(4×4, 3×3) (Lavin & Gray, arXiv:1509.09308), 36 products for 16 outputs
                instead of 144

In the last one positions lead ([h, w, b, c]), so that the transforms are products with small constant matrices from
the left. The row taps of Winograd's form follow each other, so that a sixth of the transformed tensors lives at once.
The same forms serve the gradient of the input, which is a convolution of the output's gradient. Knows the builder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from edgetune.autodiff.builder import GraphBuilder
from edgetune.autodiff.graph import Node
from edgetune.codecs.base import Array

FORM, SCALE = "form", 3
"""Private to the canonical graph, on nodes of the kind Conv: the attribute that names the form in which a train graph
computes it, and the index of the input [o, 1, 1..] that multiplies the weight (a frozen batch-norm behind it)."""
POINTWISE, DEPTHWISE, WINOGRAD = "pointwise", "depthwise", "winograd"
POSITIONS, DEPTHWISE_POSITIONS, WINOGRAD_CHANNELS = 256, 64, 128
"""The most positions of an image, and the fewest channels, for which a form is faster than the operator."""
TILE, TAPS = 4, 3
# The points of F(4, 3), ∞ besides: of those tried the ones with the least error in float32, 1.3e-6 relative to the
# norm of a product of 256 channels (2.1e-7 is that of the plain sum; 2.7e-6 with the points 0, ±1, ±2 of the paper).
POINTS = (Fraction(0), Fraction(3, 4), Fraction(-3, 4), Fraction(3, 2), Fraction(-3, 2))


@dataclass(frozen=True)
class Spread:
    """One direction of a convolution: which source positions meet which result positions.

    Attributes:
        source, result: extents of the positions that are read and made.
        kernel, pads: taps, and zeros in front, one entry per axis each.
        outputs, inputs: extents of the weight's first and second axis.
        reverse: False makes the output from the input; True the gradient of the input from that of the output: the
            weight's axes and the order of its taps turn round.
    """

    source: tuple[int, ...]
    result: tuple[int, ...]
    kernel: tuple[int, ...]
    pads: tuple[int, ...]
    outputs: int
    inputs: int
    reverse: bool = False


def emit_scaled_weight(g: GraphBuilder, node: Node) -> str:
    """Emit the weight of a Conv ``node``, multiplied by its fourth input where it has one."""
    if not node.input(SCALE):
        return node.inputs[1]
    return str(g.op("Mul", node.inputs[1], node.inputs[SCALE], hint="scaled_weight"))


def emit_pointwise(g: GraphBuilder, x: str, weight: str, bias: str, s: Spread) -> str:
    """Emit the result [b, c', *positions] of ``x`` [b, c, *positions] and ``weight`` [outputs, inputs, 1..].

    ``bias`` is [c'] or "".
    """
    source, made = (s.outputs, s.inputs) if s.reverse else (s.inputs, s.outputs)
    matrix = g.op("Reshape", weight, g.const([s.outputs, s.inputs]), hint="matrix")
    if s.reverse:
        matrix = g.op("Transpose", matrix, perm=[1, 0], hint="matrix")
    planes = g.op("Reshape", x, g.const([0, source, -1]), hint="planes")
    product = g.op("MatMul", matrix, planes, hint="product")
    if bias:
        product = g.op("Add", product, g.op("Reshape", bias, g.const([-1, 1]), hint="bias"), hint="product")
    return str(g.op("Reshape", product, g.const([0, made, *s.result]), hint="result"))


def axis_map(source: int, result: int, kernel: int, stride: int, dilation: int, pad: int) -> Array:
    """Return [taps, source positions, result positions] of one axis, 1 where the tap connects the two."""
    outputs, taps = np.arange(result), np.arange(kernel)
    read = outputs * stride + taps[:, None] * dilation - pad
    return np.asarray(np.arange(source)[:, None] == read[:, None, :], np.float32)


def depthwise_map(
    source: Sequence[int],
    result: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
) -> Array:
    """Return [taps, source positions, result positions], 1 where the tap connects the two."""
    whole = np.ones((1, 1, 1), np.float32)
    axes = zip(source, result, kernel, strides, dilations, pads, strict=True)
    for axis in axes:
        one = axis_map(*axis)
        extents = [before * more for before, more in zip(whole.shape, one.shape, strict=True)]
        whole = np.einsum("knm,lNM->klnNmM", whole, one).reshape(extents)
    return whole


def emit_depthwise(g: GraphBuilder, x: str, weight: str, bias: str, connected: Array, result: Sequence[int]) -> str:
    """Emit the result [b, c, *result] of ``x`` [b, c, *source] and ``weight`` [c, 1, *kernel]; ``bias`` is [c] or "".

    ``connected`` [taps, source positions, result positions] is a :func:`depthwise_map`, or that with its last two axes
    swapped for the gradient of the input.
    """
    taps, positions, made = connected.shape
    matrices = g.op("MatMul", _taps_of(g, weight, taps), g.const(connected.reshape(taps, -1)), hint="matrices")
    matrices = g.op("Reshape", matrices, g.const([-1, positions, made]), hint="matrices")
    channels = g.op("Transpose", _planes(g, x, positions), perm=[1, 0, 2], hint="channels_first")
    product = g.op("MatMul", channels, matrices, hint="product")
    if bias:
        product = g.op("Add", product, g.op("Reshape", bias, g.const([-1, 1, 1]), hint="bias"), hint="product")
    product = g.op("Transpose", product, perm=[1, 0, 2], hint="batch_first")
    return str(g.op("Reshape", product, g.const([0, 0, *result]), hint="result"))


def emit_depthwise_taps(g: GraphBuilder, x: str, dy: str, connected: Array) -> str:
    """Emit Σ_b,y,x X·dY for every tap, [c, taps], of ``x`` [b, c, *source] and ``dy`` [b, c, *result]."""
    taps, positions, made = connected.shape
    left = g.op("Transpose", _planes(g, x, positions), perm=[1, 2, 0], hint="positions_first")
    right = g.op("Transpose", _planes(g, dy, made), perm=[1, 0, 2], hint="channels_first")
    pairs = g.op("Reshape", g.op("MatMul", left, right, hint="pairs"), g.const([0, -1]), hint="pairs")
    matrix = np.ascontiguousarray(connected.reshape(taps, -1).T)
    return str(g.op("MatMul", pairs, g.const(matrix), hint="taps"))


def emit_winograd(g: GraphBuilder, x: str, weight: str, bias: str, s: Spread) -> str:
    """Emit the result [b, c', y, x] of ``x`` [b, c, h, w] and ``weight`` [outputs, inputs, 3, 3].

    ``bias`` is [c'] or "".
    """
    source, made = (s.outputs, s.inputs) if s.reverse else (s.inputs, s.outputs)
    (height, width), (rows, columns) = s.source, s.result
    down, across = -(-rows // TILE), -(-columns // TILE)
    _, of_weight, of_source = _transforms()
    spread = _stack([_read(width, columns, s.pads[1], of_source[j]) for j in range(len(of_source))])
    gather = np.concatenate([_written(columns, j) for j in range(len(of_source))], axis=1)
    leading = g.op("Transpose", x, perm=[2, 3, 0, 1], hint="positions_first")
    flat = g.op("Reshape", leading, g.const([height, -1]), hint="rows")
    taps = _taps_of(g, weight, TAPS * TAPS)
    total = ""
    for i in range(len(of_source)):
        kernel = np.stack([np.outer(of_weight[i], row) for row in of_weight])
        kernel = kernel[:, ::-1, ::-1] if s.reverse else kernel
        u = g.op("Gemm", g.const(_float(kernel.reshape(len(kernel), -1))), taps, transB=1, hint="weight")
        u = g.op("Reshape", u, g.const([len(kernel), s.outputs, s.inputs]), hint="weight")
        if not s.reverse:
            u = g.op("Transpose", u, perm=[0, 2, 1], hint="weight")
        v = g.op("MatMul", g.const(_read(height, rows, s.pads[0], of_source[i])), flat, hint="tiles")
        v = g.op("Reshape", v, g.const([down, width, -1]), hint="tiles")
        v = g.op("MatMul", g.const(spread), v, hint="tiles")
        v = g.op("Reshape", v, g.const([down, len(kernel), -1, source]), hint="tiles")
        product = g.op("MatMul", v, u, hint="product")
        product = g.op("Reshape", product, g.const([down, len(kernel) * across, -1]), hint="product")
        part = g.op("MatMul", g.const(gather), product, hint="part")
        part = g.op("Reshape", part, g.const([down, -1]), hint="part")
        place = g.const(_written(rows, i))
        total = g.op("Gemm", place, part, *([total] if total else []), hint="rows")
    result = g.op("Reshape", total, g.const([rows, columns, -1, made]), hint="positions_first")
    if bias:
        result = g.op("Add", result, bias, hint="result")
    return str(g.op("Transpose", result, perm=[2, 3, 0, 1], hint="result"))


def _taps_of(g: GraphBuilder, weight: str, taps: int) -> str:
    return str(g.op("Reshape", weight, g.const([-1, taps]), hint="taps"))


def _planes(g: GraphBuilder, x: str, positions: int) -> str:
    """Emit ``x`` [b, c, ..] as [b, c, positions]."""
    return str(g.op("Reshape", x, g.const([0, 0, positions]), hint="planes"))


def _float(matrix: Array) -> Array:
    return np.ascontiguousarray(matrix, dtype=np.float32)


def _stack(parts: Sequence[Array]) -> Array:
    return _float(np.concatenate(parts, axis=0))


def _read(extent: int, made: int, pad: int, row: Array) -> Array:
    """Return [tiles, extent]: what a row of the source's transform takes from every tile, the padding left out."""
    matrix = np.zeros((-(-made // TILE), extent))
    for tile in range(len(matrix)):
        for m, factor in enumerate(row):
            if 0 <= TILE * tile + m - pad < extent:
                matrix[tile, TILE * tile + m - pad] = factor
    return _float(matrix)


def _written(made: int, i: int) -> Array:
    """Return [made, tiles]: what the i-th product of every tile adds to the result, the excess left out."""
    of_result = _transforms()[0]
    matrix = np.zeros((made, -(-made // TILE)))
    for place in range(made):
        matrix[place, place // TILE] = of_result[place % TILE, i]
    return _float(matrix)


def _transforms() -> tuple[Array, Array, Array]:
    """Return Aᵀ [4, 6], G [6, 3] and Bᵀ [6, 6], float64, with y = Aᵀ((G·w) * (Bᵀ·x)) for a tile x of six.

    Toom-Cook's interpolation at ``POINTS`` and ∞, transposed: A and G evaluate polynomials of four and of three
    coefficients, B is the inverse of the evaluation of one of six.
    """
    size = TILE + TAPS - 1

    def evaluation(coefficients: int) -> Array:
        finite = [[float(p**j) for j in range(coefficients)] for p in POINTS]
        return np.array([*finite, [0.0] * (coefficients - 1) + [1.0]])

    of_source = np.linalg.inv(evaluation(size)).T
    of_weight = evaluation(TAPS)
    # Factors of two move from one transform to the other, so that both have entries of about the same size.
    scale = 2.0 ** np.round(np.log2(np.abs(of_source).max(1) / np.abs(of_weight).max(1)) / 2)[:, None]
    return evaluation(TILE).T, of_weight * scale, of_source / scale
