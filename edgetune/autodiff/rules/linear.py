"""Reverse rules of Gemm and MatMul, as linear layers and as products of two activations.

    Y = X·W:   dX = dY·Wᵀ,   dW = Xᵀ·dY          (HOSVD paper, eq. 15-16)

For a Tucker codec dW stays in the factors: X ≈ U¹·S·U²ᵀ gives dW = U²·(Sᵀ·(U¹ᵀ·dY)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgetune.autodiff.builder import GraphBuilder
from edgetune.autodiff.graph import ForwardGraph, Node
from edgetune.autodiff.rule import Context, Rule, Stored, Want, unbroadcast
from edgetune.codecs import Hosvd, Svd
from edgetune.codecs.base import Encoded, Use
from edgetune.errors import UnsupportedOperatorError


def _is_weight(graph: ForwardGraph, name: str) -> bool:
    """A weight has no batch axis."""
    return 0 not in graph.shapes[name]


def _wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    a, b = node.inputs[:2]
    linear = _is_weight(graph, b) and len(graph.shapes[b]) == 2
    wants = []
    if 1 in wrt:
        wants.append(Want(a, Use.WEIGHT_GRAD if linear else Use.VALUE, channels_last=linear))
    if 0 in wrt and not linear:
        wants.append(Want(b, Use.VALUE))
    return wants


def _gemm(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    if node.attributes.get("transA", 0) or not _is_weight(ctx.graph, node.inputs[1]):
        raise UnsupportedOperatorError(
            f"Gemm '{node.name}': only X·W with a weight W is known, not Xᵀ or W of the data"
        )
    g = ctx.g
    alpha, beta = float(node.attributes.get("alpha", 1.0)), float(node.attributes.get("beta", 1.0))
    trans_b = int(node.attributes.get("transB", 0))
    gradients: dict[int, str] = {}
    if 2 in wrt:
        scaled = dy if beta == 1.0 else g.op("Mul", dy, g.const(beta), hint="dc")
        gradients[2] = unbroadcast(ctx, scaled, node.inputs[2], node.outputs[0])
    if 1 in wrt:
        gradients[1] = _weight_gradient(ctx, node, dy, bool(trans_b), alpha)
    if 0 in wrt:
        gradients[0] = g.op("Gemm", dy, node.inputs[1], alpha=alpha, transB=1 - trans_b, hint="dx")
    return gradients


def _matmul(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, graph = ctx.g, ctx.graph
    a, b = node.inputs
    shape_a, shape_b = graph.shapes[a], graph.shapes[b]
    gradients: dict[int, str] = {}
    if _is_weight(graph, b) and len(shape_b) == 2:
        flat = dy if len(shape_a) == 2 else g.op("Reshape", dy, g.const([-1, shape_b[1]]), hint="dy_flat")
        if 1 in wrt:
            gradients[1] = _weight_gradient(ctx, node, flat, False, 1.0)
        if 0 in wrt:
            dx = g.op("Gemm", flat, b, transB=1, hint="dx")
            gradients[0] = dx if len(shape_a) == 2 else g.op("Reshape", dx, g.const([-1, *shape_a[1:]]), hint="dx")
        return gradients
    if len(shape_a) != len(shape_b) or len(shape_a) < 3:
        raise UnsupportedOperatorError(
            f"MatMul '{node.name}' of shapes {shape_a} and {shape_b}: a product of two activations needs as many axes "
            "on both sides, three at least"
        )
    swap = [*range(len(shape_a) - 2), len(shape_a) - 1, len(shape_a) - 2]
    if 0 in wrt:
        product = g.op("MatMul", dy, g.op("Transpose", ctx.value(b), perm=swap, hint="bt"), hint="da")
        gradients[0] = unbroadcast(ctx, product, a, node.outputs[0])
    if 1 in wrt:
        product = g.op("MatMul", g.op("Transpose", ctx.value(a), perm=swap, hint="at"), dy, hint="db")
        gradients[1] = unbroadcast(ctx, product, b, node.outputs[0])
    return gradients


def _weight_gradient(ctx: Context, node: Node, dy: str, transposed: bool, alpha: float) -> str:
    """Emit dW [o, c] if ``transposed``, else [c, o]; ``dy`` is [rows, o]."""
    stored = ctx.stored(node.inputs[0], 1)
    encoded, letters = stored.encoded, list(stored.encoded.bases)
    features = ctx.graph.shapes[node.inputs[0]][-1]

    def body(g: GraphBuilder, names: Sequence[str]) -> str:
        count = 1 + len(encoded.stored)
        local = Encoded(tuple(names[1:count]), dict(zip(letters, names[count:], strict=True)), None)
        inner = Stored(stored.codec, stored.saved, local)
        if stored.codec.name in (Hosvd.name, Svd.name) and len(stored.saved.shape) == 1:
            return _in_factors(g, inner, names[0], transposed, alpha)
        x = stored.codec.emit_decode(g, local, stored.saved)
        if len(stored.saved.shape) > 1:
            x = g.op("Reshape", x, g.const([-1, features]), hint="x_flat")
        pair = (names[0], x) if transposed else (x, names[0])
        return str(g.op("Gemm", *pair, transA=1, alpha=alpha, hint="dw"))

    parts = ["LinearWeightGrad", stored.codec.name, *letters, "x".join(map(str, stored.saved.shape))]
    label = "_".join([*parts, "oc" if transposed else "co", f"{alpha:g}".replace(".", "p").replace("-", "m")])
    return ctx.function(label, [dy, *encoded.stored, *encoded.bases.values()], "dw", body)


def _in_factors(g: GraphBuilder, stored: Stored, dy: str, transposed: bool, alpha: float) -> str:
    factor, core = stored.encoded.stored
    z1 = g.op("Gemm", factor, dy, transA=1, alpha=alpha, hint="z1")  # [r1, o]
    basis = stored.encoded.bases.get("c")
    if basis is not None:
        basis = g.op("Reshape", basis, g.const([stored.saved.shape[0], -1]), hint="basis")
    if transposed:
        dw = g.op("Gemm", z1, core, transA=1, hint="dw")  # [o, r2]
        return str(dw if basis is None else g.op("Gemm", dw, basis, transB=1, hint="dw"))
    dw = g.op("Gemm", core, z1, transA=1, hint="dw")  # [r2, o]
    return str(dw if basis is None else g.op("MatMul", basis, dw, hint="dw"))


RULES = {
    "Gemm": Rule(_wants, _gemm, "its input, through a codec"),
    "MatMul": Rule(_wants, _matmul, "its input, through a codec (two activations: both)"),
}
