"""What the weight gradients of all layers share: a function of dY and of what was kept. Knows rules and codecs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgetune.autodiff.builder import GraphBuilder
from edgetune.autodiff.rule import Context, Kept, Stored
from edgetune.codecs import identifier
from edgetune.codecs.base import Encoded

WeightGradient = Callable[[GraphBuilder, Stored, str], str]
"""(builder, what was kept, dY) -> dW"""


def emit_weight_gradient(ctx: Context, kept: Kept, dy: str, label: str, rule: WeightGradient) -> str:
    """Emit dW as a call of one model-local function ``<label>`` per codec that a plan may choose.

    ``rule`` emits the body. ``label`` must tell apart all that it depends on beyond the codec and its modes, which are
    added here.
    """
    return ctx.choose(kept.name, [_emit(ctx, stored, dy, label, rule) for stored in kept.options], "dw")


def _emit(ctx: Context, stored: Stored, dy: str, label: str, rule: WeightGradient) -> str:
    encoded = stored.encoded
    letters = list(encoded.bases)

    def body(g: GraphBuilder, names: Sequence[str]) -> str:
        count = 1 + len(encoded.stored)
        local = Encoded(tuple(names[1:count]), dict(zip(letters, names[count:], strict=True)), None)
        return rule(g, Stored(stored.codec, stored.saved, local), names[0])

    inputs = [dy, *encoded.stored, *encoded.bases.values()]
    return ctx.function("_".join([label, identifier(stored.codec), *letters]), inputs, "dw", body)


def emit_batch_rank(g: GraphBuilder, stored: Stored, dy: str) -> str:
    """Emit Z1[r1, n] = Σ_b U¹[b,r1] · dY[b,n] (eq. 20) for dY [b, n] or [b, ...], whose axes behind b are joined."""
    rows = g.op("Flatten", dy, axis=1, hint="dy_flat")
    return str(g.op("Gemm", stored.encoded.stored[0], rows, transA=1, hint="z1"))
