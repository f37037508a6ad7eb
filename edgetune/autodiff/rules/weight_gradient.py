"""What the weight gradients of all layers share: a function of dY and of what was kept. Knows rules and codecs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

from edgetune.autodiff.builder import GraphBuilder
from edgetune.autodiff.rule import Context, Kept, Stored
from edgetune.codecs import Asi, Hosvd, HosvdExact, identifier, opened
from edgetune.codecs.base import Encoded
from edgetune.codecs.batch_tucker import emit_as_hosvd

WeightGradient = Callable[[GraphBuilder, Stored, str], str]
"""(builder, what was kept, dY) -> dW"""
Layer = TypeVar("Layer")
"""The static numbers of a layer, as its rule has them."""
FactoredGradient = Callable[[GraphBuilder, Stored, str, Layer], str]
"""(builder, what was kept, dY, layer) -> dW"""


def emit_weight_gradient(ctx: Context, kept: Kept, dy: str, label: str, rule: WeightGradient) -> str:
    """Emit dW as a call of one model-local function ``<label>`` per codec that a plan may choose.

    ``rule`` emits the body. It never meets a codec that stores float16: its tensors arrive as float32. ``label`` must
    tell apart all that the rule depends on beyond the codec and its modes, which are added here.
    """
    return ctx.choose(kept.name, [_emit(ctx, stored, dy, label, rule) for stored in kept.options], "dw")


def _emit(ctx: Context, stored: Stored, dy: str, label: str, rule: WeightGradient) -> str:
    encoded = stored.encoded
    letters = list(encoded.bases)

    def body(g: GraphBuilder, names: Sequence[str]) -> str:
        count = 1 + len(encoded.stored)
        local = Encoded(tuple(names[1:count]), dict(zip(letters, names[count:], strict=True)), None)
        codec, wide = opened(g, stored.codec, local, stored.saved)
        return rule(g, Stored(codec, stored.saved, wide), names[0])

    inputs = [dy, *encoded.stored, *encoded.bases.values()]
    return ctx.function("_".join([label, identifier(stored.codec), *letters]), inputs, "dw", body)


def emit_batch_rank(g: GraphBuilder, stored: Stored, dy: str) -> str:
    """Emit Z1[r1, n] = Σ_b U¹[b,r1] · dY[b,n] (eq. 20) for dY [b, n] or [b, ...], whose axes behind b are joined."""
    rows = g.op("Flatten", dy, axis=1, hint="dy_flat")
    return str(g.op("Gemm", stored.encoded.stored[0], rows, transA=1, hint="z1"))


def for_tucker(rule: FactoredGradient[Layer]) -> dict[str, FactoredGradient[Layer]]:
    """Return ``rule``, which reads factors as the codec hosvd has them, by name for every codec with a Tucker core."""

    def from_stored(g: GraphBuilder, stored: Stored, dy: str, layer: Layer) -> str:
        encoded = emit_as_hosvd(g, stored.encoded, stored.saved)
        return rule(g, dataclasses.replace(stored, encoded=encoded), dy, layer)

    return {Hosvd.name: rule, HosvdExact.name: from_stored, Asi.name: from_stored}
