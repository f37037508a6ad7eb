"""Reverse rules of linear layers: Gemm (inputs of two axes) and Linear (any number of axes, the channels last).

    Y[b,h,w,o] = Σ_c X[b,h,w,c]·W[o,c]:   dX = dY·W,   dW[o,c] = Σ_b,h,w dY[b,h,w,o]·X[b,h,w,c]     (eq. 15-16)

For a Tucker codec dW stays in the factors (HOSVD paper): with X ≈ S ×₁U¹ ×₂U² ×₃U³ ×₄U⁴

    Z[r1,r2,r3,o] = Σ_b,h,w U¹[b,r1]·U²[h,r2]·U³[w,r3]·dY[b,h,w,o]
    dW[o,c]       = Σ_r4 ( Σ_r1,r2,r3 Z[r1,r2,r3,o]·S[r1,r2,r3,r4] )·U⁴[c,r4]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgetune.autodiff.builder import GraphBuilder
from edgetune.autodiff.graph import ForwardGraph, Node
from edgetune.autodiff.rule import Context, Rule, Stored, Want, unbroadcast
from edgetune.autodiff.rules.weight_gradient import emit_batch_rank, emit_weight_gradient, for_tucker
from edgetune.codecs import Svd
from edgetune.codecs.base import Use
from edgetune.codecs.hosvd import emit_batch_first
from edgetune.codecs.tucker import emit_matrix, emit_project_positions
from edgetune.errors import UnsupportedOperatorError


@dataclass(frozen=True)
class _Layer:
    """The static numbers of one linear layer: W is [o, c] if ``transposed``, else [c, o]; dW is scaled by ``alpha``."""

    inputs: int
    outputs: int
    transposed: bool
    alpha: float = 1.0

    @staticmethod
    def of(graph: ForwardGraph, node: Node, transposed: bool, alpha: float = 1.0) -> _Layer:
        """Read the layer of a node whose second input is the weight."""
        shape = graph.shapes[node.inputs[1]]
        outputs, inputs = shape if transposed else shape[::-1]
        return _Layer(inputs, outputs, transposed, alpha)


def _is_weight(graph: ForwardGraph, name: str) -> bool:
    """A weight has two axes, neither of them the batch."""
    return len(graph.shapes[name]) == 2 and all(extent > 0 for extent in graph.shapes[name])


def _wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    return [Want(node.inputs[0], Use.WEIGHT_GRAD, channels_last=True)] if 1 in wrt else []


def _linear(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    return _gradients(ctx, node, wrt, dy, _Layer.of(ctx.graph, node, bool(node.attributes["transposed"])))


def _gemm(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    if node.attributes.get("transA", 0) or not _is_weight(ctx.graph, node.inputs[1]):
        raise UnsupportedOperatorError(
            f"Gemm '{node.name}': only X·W with a weight W is known, not Xᵀ or W of the data"
        )
    alpha, beta = float(node.attributes.get("alpha", 1.0)), float(node.attributes.get("beta", 1.0))
    layer = _Layer.of(ctx.graph, node, bool(node.attributes.get("transB", 0)), alpha)
    return _gradients(ctx, node, wrt, dy, layer, beta)


def _gradients(
    ctx: Context, node: Node, wrt: frozenset[int], dy: str, layer: _Layer, beta: float = 1.0
) -> Mapping[int, str]:
    """Emit the gradients of Y = alpha·X·W + ``beta``·bias."""
    gradients: dict[int, str] = {}
    if 2 in wrt:
        scaled = dy if beta == 1.0 else ctx.g.op("Mul", dy, ctx.g.const(beta), hint="dc")
        gradients[2] = unbroadcast(ctx, scaled, node.inputs[2], node.outputs[0])
    if 1 in wrt:
        gradients[1] = _weight_gradient(ctx, node, dy, layer)
    if 0 in wrt:
        gradients[0] = _input_gradient(ctx, node, dy, layer)
    return gradients


def _input_gradient(ctx: Context, node: Node, dy: str, layer: _Layer) -> str:
    """Emit dX, in the shape of X."""
    g, x = ctx.g, node.inputs[0]
    many = len(ctx.graph.shapes[x]) > 2
    rows = g.op("Reshape", dy, g.const([-1, layer.outputs]), hint="dy_rows") if many else dy
    dx = g.op("Gemm", rows, node.inputs[1], alpha=layer.alpha, transB=int(not layer.transposed), hint="dx")
    return str(g.op("Reshape", dx, g.const(ctx.graph.reshape_target(x)), hint="dx") if many else dx)


def _weight_gradient(ctx: Context, node: Node, dy: str, layer: _Layer) -> str:
    """Emit dW, in the shape of W."""
    stored = ctx.stored(node.inputs[0], channels_last=True)

    def rule(g: GraphBuilder, inner: Stored, dy: str) -> str:
        return _IN_FACTORS.get(inner.codec.name, _decoded_weight_gradient)(g, inner, dy, layer)

    shapes = ["x".join(map(str, (*stored.saved.shape, layer.outputs))), "oc" if layer.transposed else "co"]
    alpha = [] if layer.alpha == 1.0 else [f"{layer.alpha:g}".replace(".", "p").replace("-", "m")]
    return emit_weight_gradient(ctx, stored, dy, "_".join(["LinearWeightGrad", *shapes, *alpha]), rule)


def _product(g: GraphBuilder, x: str, dy: str, layer: _Layer) -> str:
    """Emit α·Σ_n of rows ``x`` [n, c] and ``dy`` [n, o]: [o, c] or [c, o], as the weight has it."""
    pair = (dy, x) if layer.transposed else (x, dy)
    return str(g.op("Gemm", *pair, transA=1, alpha=layer.alpha, hint="dw"))


def _decoded_weight_gradient(g: GraphBuilder, stored: Stored, dy: str, layer: _Layer) -> str:
    """Emit the default of every codec: decode, then the ordinary rule."""
    x = stored.codec.emit_decode(g, stored.encoded, stored.saved)
    x = g.op("Reshape", x, g.const([-1, layer.inputs]), hint="x_rows")
    return _product(g, x, g.op("Reshape", dy, g.const([-1, layer.outputs]), hint="dy_rows"), layer)


def _svd_weight_gradient(g: GraphBuilder, stored: Stored, dy: str, layer: _Layer) -> str:
    z1 = emit_batch_rank(g, stored, _by_sample(g, stored, dy, layer))
    core = g.op("Reshape", stored.encoded.stored[1], g.const([-1, layer.inputs]), hint="core_rows")
    return _product(g, core, g.op("Reshape", z1, g.const([-1, layer.outputs]), hint="z1_rows"), layer)


def _hosvd_weight_gradient(g: GraphBuilder, stored: Stored, dy: str, layer: _Layer) -> str:
    positions, bases = stored.saved.positions, stored.encoded.bases
    z = emit_batch_rank(g, stored, _by_sample(g, stored, dy, layer))
    core = emit_batch_first(g, stored.encoded, stored.saved)
    if positions:
        z = g.op("Reshape", z, g.const([0, *positions, layer.outputs]), hint="z1")
        z = emit_project_positions(g, z, positions, bases, lead=1, trail=(layer.outputs,))
        z = g.op("Flatten", z, axis=1 + len(positions), hint="z_rows")
        core = g.op("Flatten", core, axis=1 + len(positions), hint="core_rows")
    dw = _product(g, core, z, layer)  # [o, rc] or [rc, o]
    if "c" not in bases:
        return dw
    basis = emit_matrix(g, bases["c"], layer.inputs)
    return str(g.op("Gemm", dw, basis, transB=1, hint="dw") if layer.transposed else g.op("MatMul", basis, dw))


def _by_sample(g: GraphBuilder, stored: Stored, dy: str, layer: _Layer) -> str:
    """Emit dY, which has any axes in front of o, as [b, *positions, o] joined to [b, n]."""
    return str(g.op("Reshape", dy, g.const([-1, math.prod(stored.saved.positions) * layer.outputs]), hint="dy_samples"))


_IN_FACTORS = {Svd.name: _svd_weight_gradient, **for_tucker(_hosvd_weight_gradient)}

RULES = {
    "Gemm": Rule(_wants, _gemm, "its input, through a codec"),
    "Linear": Rule(_wants, _linear, "its input, through a codec"),
}
