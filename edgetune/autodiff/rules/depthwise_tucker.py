"""The weight gradient of a depthwise convolution in the factors of a Tucker codec, for few positions.

With X[b,g,h,w] ≈ Σ U¹[b,r1]·S[g,r3,r1,r4]·U³[h,r3]·U⁴[w,r4] (HOSVD paper, eq. 18; the channels stay whole)

    Z1[g,y,x,r1]      = Σ_b  dY[b,g,y,x]·U¹[b,r1]                                        (eq. 20)
    M[g,r3,y,x,r4]    = Σ_r1 Z1[g,y,x,r1]·S[g,r3,r1,r4]
    T[r3,y,x,r4,k,l]  = U³[y·s+k·d-p, r3]·U⁴[x·s+l·d-p, r4]                              nothing where h or w is padding
    dW[g,k,l]         = Σ_r3,y,x,r4 M[g,r3,y,x,r4]·T[r3,y,x,r4,k,l]

T is small and the same for all channels, so that all taps are one product; neither X nor Z3 is ever spelled out, padded
or sliced. M has as many elements as there are pairs of a rank and an output position, hence the bound.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edgetune.autodiff.builder import GraphBuilder
from edgetune.autodiff.convolution import axis_map
from edgetune.autodiff.rule import Stored
from edgetune.codecs.base import POSITIONS, Array
from edgetune.codecs.tucker import emit_matrix

if TYPE_CHECKING:
    from edgetune.autodiff.rules.conv import Geometry

MOST_PAIRS = 10_000
"""Of an input and an output position: 7 × 7 by 7 × 7 and 14 × 14 by 7 × 7 are below it, 14 × 14 by 14 × 14 is not."""


def suits(geometry: Geometry) -> bool:
    """Tell whether the layer is depthwise and small enough for this form."""
    return geometry.depthwise and math.prod(geometry.input) * math.prod(geometry.output) <= MOST_PAIRS


def emit_depthwise_in_factors(g: GraphBuilder, stored: Stored, dy: str, geometry: Geometry) -> str:
    """Emit dW [g, taps] for ``dy`` [b, g, *output]."""
    factor, core = stored.encoded.stored  # [b, r1], [g, 1, *ranks, r1, rank]
    rows = g.op("Flatten", dy, axis=1, hint="dy_flat")
    z1 = g.op("Gemm", rows, factor, transA=1, hint="z1")
    lead = [1] * len(geometry.kernel)
    z1 = g.op("Reshape", z1, g.const([geometry.groups, *lead, math.prod(geometry.output), -1]), hint="z1")
    pairs = g.op("MatMul", z1, core, hint="pairs")
    flat = g.op("Reshape", pairs, g.const([geometry.groups, -1]), hint="pairs_flat")
    return str(g.op("MatMul", flat, _emit_taps(g, stored, geometry), hint="dw"))


def _emit_taps(g: GraphBuilder, stored: Stored, geometry: Geometry) -> str:
    """Emit T as a matrix: [all ranks but the last, all of y, the last rank] by [all of k]."""
    spatial = len(geometry.kernel)
    letters = POSITIONS[len(POSITIONS) - spatial :]
    product = ""
    for i, letter in enumerate(letters):
        own = g.const(_meets(geometry, i))  # [h, y·k]
        if letter in stored.encoded.bases:
            basis = emit_matrix(g, stored.encoded.bases[letter], geometry.input[i])
            own = g.op("Gemm", basis, own, transA=1, hint=f"reach_{letter}")
        own = g.op("Reshape", own, g.const([-1, geometry.output[i], geometry.kernel[i]]), hint=f"reach_{letter}")
        last = i == spatial - 1
        if last:
            own = g.op("Transpose", own, perm=[1, 0, 2], hint=f"reach_{letter}")
        rank = 2 * spatial - 1 if last else i
        taken = {rank, spatial - 1 + i, 2 * spatial + i}
        others = [axis for axis in range(3 * spatial) if axis not in taken]
        own = g.op("Unsqueeze", own, g.const(others), hint=f"reach_{letter}") if others else own
        product = g.op("Mul", product, own, hint="taps") if product else own
    return str(g.op("Reshape", product, g.const([-1, math.prod(geometry.kernel)]), hint="taps"))


def _meets(geometry: Geometry, axis: int) -> Array:
    """Return [h, y·k] of one axis: whether tap k of output position y reads the input position h."""
    connected = axis_map(
        geometry.input[axis], geometry.output[axis], geometry.kernel[axis], geometry.strides[axis],
        geometry.dilations[axis], geometry.pads_begin[axis],
    )  # fmt: skip
    return np.ascontiguousarray(connected.transpose(1, 2, 0)).reshape(geometry.input[axis], -1)
