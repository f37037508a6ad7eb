"""Products of a tensor with a factor along one mode, as nodes. Knows the emitter protocol.

Ranks are run-time values, so a Reshape may leave one extent to be inferred, and 0 copies the one at the same index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgetune.codecs.base import POSITIONS, Emitter


def emit_along(g: Emitter, x: str, basis: str, *, lead: int, trail: Sequence[int], back: bool, hint: str) -> str:
    """Emit the product of ``x`` [*lead, n, *trail] with ``basis`` [1, n, r] over n: [*lead, r, *trail].

    ``lead`` counts the axes in front, which may have any extents; of the extents ``trail`` behind one may be -1.
    With ``back`` it is the other way round, from r to n.
    """
    left = bool(trail)
    if left != back:
        basis = g.op("Transpose", basis, perm=[0, 2, 1], hint=f"{hint}_basis_t")
    if not left:
        return str(g.op("MatMul", x, basis, hint=hint))
    if len(trail) == 1:
        return str(g.op("MatMul", basis, x, hint=hint))
    flat = g.op("Reshape", x, g.const([0] * (lead + 1) + [-1]), hint=f"{hint}_flat")
    product = g.op("MatMul", basis, flat, hint=hint)
    return str(g.op("Reshape", product, g.const([0] * (lead + 1) + list(trail)), hint=hint))


def emit_project_positions(
    g: Emitter, x: str, positions: Sequence[int], bases: Mapping[str, str], *, lead: int, trail: Sequence[int] = ()
) -> str:
    """Emit ``x`` [*lead, *positions, *trail] projected on the basis of every position mode that has one."""
    for i, letter in enumerate(POSITIONS[len(POSITIONS) - len(positions) :]):
        if letter in bases:
            behind = [*positions[i + 1 :], *trail]
            x = emit_along(g, x, bases[letter], lead=lead + i, trail=behind, back=False, hint=f"project_{letter}")
    return x


def emit_expand_positions(
    g: Emitter, x: str, positions: Sequence[int], bases: Mapping[str, str], *, lead: int, trail: Sequence[int] = ()
) -> str:
    """Emit the reverse: from ranks [*lead, *ranks, *trail] to [*lead, *positions, *trail], the last mode first."""
    for i in reversed(range(len(positions))):
        letter = POSITIONS[len(POSITIONS) - len(positions) + i]
        if letter in bases:
            behind = [*positions[i + 1 :], *trail]
            x = emit_along(g, x, bases[letter], lead=lead + i, trail=behind, back=True, hint=f"expand_{letter}")
    return x


def emit_joined(g: Emitter, basis: str, size: int, inside: int) -> str:
    """Emit ``basis`` [1, size, r] as a matrix [size·inside, r·inside]: the positions behind, ``inside`` of them, stay.

    One product with this Kronecker product is as good as one small product per sample and channel.
    """
    tall = g.op("Reshape", basis, g.const([size, 1, -1, 1]), hint="tall")
    unit = g.const(np.eye(inside, dtype=np.float32).reshape(1, inside, 1, inside))
    return str(g.op("Reshape", g.op("Mul", tall, unit, hint="joined"), g.const([size * inside, -1]), hint="joined"))


def emit_unfolding(g: Emitter, x: str, axis: int, axes: int) -> tuple[str, bool]:
    """Emit the unfolding A of ``x`` along ``axis``, its extent n by all else; return its name, and whether it is Aᵀ.

    Of the first axis and of the last one there is no copy.
    """
    if axis == axes - 1:
        return str(g.op("Flatten", x, axis=axis, hint="columns")), True
    if axis:
        x = g.op("Transpose", x, perm=[axis, *(i for i in range(axes) if i != axis)], hint="first")
    return str(g.op("Flatten", x, axis=1, hint="rows")), False


def emit_matrix(g: Emitter, basis: str, size: int) -> str:
    """Emit a basis [1, size, r] as a matrix [size, r]."""
    return str(g.op("Reshape", basis, g.const([size, -1]), hint="basis"))
