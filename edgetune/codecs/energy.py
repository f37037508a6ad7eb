"""The captured energy of an orthogonal projection, ‖decoded‖²/‖X‖², as nodes. Knows the emitter protocol."""

from __future__ import annotations

from edgetune.codecs.base import Emitter

# Added above and below the fraction, so that a tensor of zeros counts as captured whole.
TINY = 1e-30


def emit_captured_energy(g: Emitter, core: str, core_axes: int, x: str, axes: int) -> str:
    """Emit ‖core‖²/‖x‖²: with orthonormal factors the core has the norm of the decoded tensor. Returns a scalar."""
    tiny = g.const(TINY)
    kept = g.op("Add", emit_square_norm(g, core, core_axes), tiny, hint="kept")
    total = g.op("Add", emit_square_norm(g, x, axes), tiny, hint="total")
    return str(g.op("Div", kept, total, hint="energy"))


def emit_square_norm(g: Emitter, x: str, axes: int) -> str:
    """Emit ‖x‖², one axis after the other: one float32 sum over a whole activation would lose the fifth digit."""
    norm = g.op("ReduceSumSquare", x, g.const([-1]), keepdims=0, hint="squares")
    for _ in range(axes - 1):
        norm = g.op("ReduceSum", norm, g.const([-1]), keepdims=0, hint="square_norm")
    return str(norm)
