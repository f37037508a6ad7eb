"""Reverse rule of MatMul of any two tensors: batch dimensions, broadcasting, operands of one axis.

    Y = A·B:   dA = dY·Bᵀ,   dB = Aᵀ·dY,   each summed over the dimensions along which it was broadcast

An operand of one axis is a row (A) or a column (B) and vanishes from the result. Layers whose weight is trained with a
compressed input are Linear and Gemm nodes (``linear.py``), not these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgetune.autodiff.graph import ForwardGraph, Node
from edgetune.autodiff.rule import Context, Rule, Want, sum_to
from edgetune.autodiff.rules.axes import target
from edgetune.codecs.base import Use


def _wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    return [Want(node.inputs[1 - i], Use.VALUE) for i in sorted(wrt)]


def _matrices(shape_a: Sequence[int], shape_b: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the operands with their row and column axes added."""
    return (1, *shape_a) if len(shape_a) == 1 else tuple(shape_a), (
        (*shape_b, 1) if len(shape_b) == 1 else tuple(shape_b)
    )


def _backward(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, shapes = ctx.g, ctx.graph.shapes
    given = [shapes[name] for name in node.inputs]
    a_shape, b_shape = _matrices(*given)
    result = list(shapes[node.outputs[0]])
    lead = result[: len(result) - (len(given[0]) > 1) - (len(given[1]) > 1)]
    rows, inner, columns = a_shape[-2], a_shape[-1], b_shape[-1]
    if [*lead, rows, columns] != result:
        dy = g.op("Reshape", dy, g.const(target([*lead, rows, columns])), hint="dy")

    def operand(index: int, shape: Sequence[int]) -> str:
        value = ctx.value(node.inputs[index])
        return value if tuple(shape) == given[index] else g.op("Reshape", value, g.const(target(shape)), hint="matrix")

    def shaped(index: int, gradient: str, shape: Sequence[int]) -> str:
        if tuple(shape) == given[index]:
            return gradient
        return str(g.op("Reshape", gradient, g.const(target(given[index])), hint="d"))

    gradients = {}
    if len(b_shape) == 2 and len(a_shape) > 2 and min(b_shape) > 0:
        # One matrix for all rows: two plain products, nothing to sum.
        flat = g.op("Reshape", dy, g.const([-1, columns]), hint="dy_rows")
        if 0 in wrt:
            da = g.op("Gemm", flat, operand(1, b_shape), transB=1, hint="da")
            gradients[0] = g.op("Reshape", da, g.const(target(given[0])), hint="da")
        if 1 in wrt:
            a_rows = g.op("Reshape", operand(0, a_shape), g.const([-1, inner]), hint="a_rows")
            gradients[1] = shaped(1, g.op("Gemm", a_rows, flat, transA=1, hint="db"), b_shape)
        return gradients
    if 0 in wrt:
        product = g.op("MatMul", dy, _swapped(ctx, operand(1, b_shape), len(b_shape)), hint="da")
        gradients[0] = shaped(0, sum_to(g, product, [*lead, rows, inner], a_shape), a_shape)
    if 1 in wrt:
        product = g.op("MatMul", _swapped(ctx, operand(0, a_shape), len(a_shape)), dy, hint="db")
        gradients[1] = shaped(1, sum_to(g, product, [*lead, inner, columns], b_shape), b_shape)
    return gradients


def _swapped(ctx: Context, tensor: str, rank: int) -> str:
    return str(ctx.g.op("Transpose", tensor, perm=[*range(rank - 2), rank - 1, rank - 2], hint="swapped"))


RULES = {"MatMul": Rule(_wants, _backward, "the other operand")}
