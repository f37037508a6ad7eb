"""Reverse rule of Conv, any number of spatial axes, groups, stride, dilation, padding of each side its own.

    dX           = transposed convolution of dY with W: exact, from W and dY alone
    dW[o,c,k,l]  = Σ_b,y,x X[b, c, y·s+k·d-p, x·s+l·d-p] · dY[b,o,y,x]        one matrix product per tap (k, l)
    db[o]        = Σ_b,y,x dY[b,o,y,x]

For a Tucker codec the weight gradient stays in the factors (HOSVD paper, eq. 20-24): the same taps, over the batch rank
and the channel rank instead of the batch and the channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgetune.autodiff.builder import GraphBuilder
from edgetune.autodiff.convolution import (
    DEPTHWISE,
    DEPTHWISE_POSITIONS,
    FORM,
    POINTWISE,
    POSITIONS,
    SCALE,
    TAPS,
    TILE,
    WINOGRAD,
    WINOGRAD_CHANNELS,
    Spread,
    depthwise_map,
    emit_depthwise,
    emit_depthwise_taps,
    emit_pointwise,
    emit_scaled_weight,
    emit_winograd,
)
from edgetune.autodiff.graph import ForwardGraph, Node
from edgetune.autodiff.lowering import emit_node
from edgetune.autodiff.rule import Context, ForwardRule, Rule, Stored, Want
from edgetune.autodiff.rules.depthwise_tucker import emit_depthwise_in_factors, suits
from edgetune.autodiff.rules.weight_gradient import emit_batch_rank, emit_weight_gradient, for_tucker
from edgetune.codecs import Svd
from edgetune.codecs.base import Array, Use
from edgetune.codecs.hosvd import emit_spatial


@dataclass(frozen=True)
class Geometry:
    """The static numbers of one convolution; one entry per spatial axis in each tuple."""

    groups: int
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads_begin: tuple[int, ...]
    pads_end: tuple[int, ...]
    kernel: tuple[int, ...]
    input: tuple[int, ...]
    output: tuple[int, ...]
    in_channels: int
    out_channels: int

    @staticmethod
    def of(graph: ForwardGraph, node: Node) -> Geometry:
        """Read the geometry of a Conv node; its padding must be explicit."""
        weight = graph.shapes[node.inputs[1]]
        spatial = len(weight) - 2
        pads = tuple(node.attributes.get("pads", (0,) * (2 * spatial)))
        return Geometry(
            groups=int(node.attributes.get("group", 1)),
            strides=tuple(node.attributes.get("strides", (1,) * spatial)),
            dilations=tuple(node.attributes.get("dilations", (1,) * spatial)),
            pads_begin=pads[:spatial],
            pads_end=pads[spatial:],
            kernel=tuple(weight[2:]),
            input=graph.shapes[node.inputs[0]][2:],
            output=graph.shapes[node.outputs[0]][2:],
            in_channels=graph.shapes[node.inputs[0]][1],
            out_channels=weight[0],
        )

    @property
    def depthwise(self) -> bool:
        """Whether every channel has a kernel of its own, and makes one channel."""
        return 1 < self.groups == self.in_channels == self.out_channels

    @property
    def label(self) -> str:
        """A name for functions that depend on these numbers, and on nothing else."""
        parts = {
            "g": (self.groups,), "i": self.input, "k": self.kernel, "s": self.strides, "d": self.dilations,
            "p": self.pads_begin + self.pads_end,
        }  # fmt: skip
        return "_".join(letter + "x".join(map(str, values)) for letter, values in parts.items())


def transposed_convolution(g: GraphBuilder, dy: str, weight: str, geometry: Geometry) -> str:
    """Emit dX. ``output_padding`` restores the rows that a stride left over."""
    leftover = [
        size + begin + end - dilation * (kernel - 1) - 1 - stride * (out - 1)
        for size, begin, end, dilation, kernel, stride, out in zip(
            geometry.input, geometry.pads_begin, geometry.pads_end, geometry.dilations, geometry.kernel,
            geometry.strides, geometry.output, strict=True,
        )
    ]  # fmt: skip
    name = g.op(
        "ConvTranspose",
        dy,
        weight,
        hint="dx",
        group=geometry.groups,
        strides=list(geometry.strides),
        dilations=list(geometry.dilations),
        pads=[*geometry.pads_begin, *geometry.pads_end],
        kernel_shape=list(geometry.kernel),
        output_padding=leftover,
    )
    return str(name)


def form_of(geometry: Geometry) -> str:
    """Return the form in which a convolution takes the least time: one of those in ``convolution``, or "" for Conv.

    The bounds are from measurements with onnxruntime on two cores, batches of 8 and 64.
    """
    positions = max(math.prod(geometry.input), math.prod(geometry.output))
    plain = set(geometry.strides + geometry.dilations) == {1}
    if geometry.depthwise:
        return DEPTHWISE if positions <= DEPTHWISE_POSITIONS and math.prod(geometry.kernel) > 1 else ""
    if geometry.groups > 1 or not plain:
        return ""
    if math.prod(geometry.kernel) == 1:
        padded = any(geometry.pads_begin + geometry.pads_end)
        return POINTWISE if positions <= POSITIONS and not padded else ""
    wide = min(geometry.in_channels, geometry.out_channels) >= WINOGRAD_CHANNELS
    fits = positions <= POSITIONS and min(geometry.output) >= TILE
    return WINOGRAD if wide and fits and geometry.kernel == (TAPS, TAPS) else ""


def with_form(graph: ForwardGraph, node: Node) -> Node:
    """Return ``node``, if it is a Conv with the form that suits it."""
    if node.op != "Conv":
        return node
    form = form_of(Geometry.of(graph, node))
    return dataclasses.replace(node, attributes={**node.attributes, FORM: form}) if form else node


def _connected(geometry: Geometry) -> Array:
    return depthwise_map(
        geometry.input, geometry.output, geometry.kernel, geometry.strides, geometry.dilations, geometry.pads_begin
    )


def _emit_form(ctx: Context, node: Node, geometry: Geometry, x: str, weight: str, *, bias: str, reverse: bool) -> str:
    """Emit the result of the convolution, or the gradient of its input, in the form that ``node`` has been given."""
    form = str(node.attributes[FORM])
    source, result, pads = geometry.input, geometry.output, geometry.pads_begin
    if reverse:
        source, result = result, source
        pads = tuple(k - 1 - p for k, p in zip(geometry.kernel, pads, strict=True))
    shape = ctx.graph.shapes[node.inputs[1]]
    spread = Spread(source, result, geometry.kernel, pads, shape[0], shape[1], reverse)

    def body(g: GraphBuilder, names: Sequence[str]) -> str:
        x, weight, own = names[0], names[1], names[2] if bias else ""
        if form == POINTWISE:
            return emit_pointwise(g, x, weight, own, spread)
        if form == WINOGRAD:
            return emit_winograd(g, x, weight, own, spread)
        connected = _connected(geometry)
        connected = np.ascontiguousarray(connected.transpose(0, 2, 1)) if reverse else connected
        return emit_depthwise(g, x, weight, own, connected, result)

    verb = "ConvInputGrad" if reverse else "ConvForward"
    label = f"{verb}_{form}_{geometry.label}_w{shape[0]}x{shape[1]}" + ("_bias" if bias else "")
    return ctx.function(label, [x, weight, *([bias] if bias else [])], "dx" if reverse else "y", body)


def weight_gradient_taps(g: GraphBuilder, x: str, dy: str, geometry: Geometry) -> str:
    """Emit Σ_b,y,x X·dY for every tap: [o, c, *kernel], or [g, o, c, *kernel] with o and c within a group if grouped.

    ``x`` is [b, c, *input] (grouped: [b, g, c, *input] or [b, g·c, *input]), ``dy`` [b, o, *output]. The extents b and
    c may be ranks, unknown until run time, so every reshape leaves one of them at most to be inferred.
    """
    spatial = len(geometry.kernel)
    if geometry.groups == 1:
        # Channels last: a tap is a slice of whole rows, and flattens to [b·y·x, c] without a copy.
        source = g.op("Transpose", x, perm=[0, *range(2, 2 + spatial), 1], hint="x_last")
        source = _pad(g, source, geometry, lead=1, trail=1)
        rows = g.op("Flatten", g.op("Transpose", dy, perm=[1, 0, *range(2, 2 + spatial)], hint="dy_first"), axis=1)

        def product(tap: tuple[int, ...]) -> str:
            window = _window(g, source, geometry, tap, lead=1)
            columns = g.op("Flatten", window, axis=1 + spatial, hint="columns")
            return str(g.op("MatMul", rows, columns, hint="tap"))

        return _stack(g, product, geometry.kernel, lead=2)
    if form_of(geometry) == DEPTHWISE:
        taps = emit_depthwise_taps(g, x, dy, _connected(geometry))
        return str(g.op("Reshape", taps, g.const([0, 1, 1, *geometry.kernel]), hint="taps"))
    grouped = g.op("Reshape", x, g.const([0, geometry.groups, -1, *geometry.input]), hint="x_grouped")
    source = g.op("Transpose", grouped, perm=[1, 2, 0, *range(3, 3 + spatial)], hint="x_first")
    source = _pad(g, source, geometry, lead=3, trail=0)
    dy = g.op("Reshape", dy, g.const([0, geometry.groups, -1, *geometry.output]), hint="dy_grouped")
    dy = g.op("Transpose", dy, perm=[1, 2, 0, *range(3, 3 + spatial)], hint="dy_first")
    rows = g.op("Transpose", g.op("Reshape", dy, g.const([0, 0, -1])), perm=[0, 2, 1], hint="dy_rows")

    def grouped_product(tap: tuple[int, ...]) -> str:
        window = _window(g, source, geometry, tap, lead=3)
        columns = g.op("Reshape", window, g.const([0, 0, -1]), hint="columns")
        return str(g.op("Transpose", g.op("MatMul", columns, rows, hint="tap"), perm=[0, 2, 1], hint="tap"))

    return _stack(g, grouped_product, geometry.kernel, lead=3)


def _stack(g: GraphBuilder, product: Callable[[tuple[int, ...]], str], kernel: tuple[int, ...], *, lead: int) -> str:
    """Join the products of all taps along new trailing axes; each row is joined as soon as its taps are there."""

    def build(prefix: tuple[int, ...]) -> str:
        axis = len(prefix)
        if axis == len(kernel):
            return str(g.op("Unsqueeze", product(prefix), g.const([lead + i for i in range(axis)]), hint="tap"))
        parts = [build((*prefix, i)) for i in range(kernel[axis])]
        return parts[0] if len(parts) == 1 else str(g.op("Concat", *parts, axis=lead + axis, hint="taps"))

    return build(())


def _pad(g: GraphBuilder, source: str, geometry: Geometry, *, lead: int, trail: int) -> str:
    if not any(geometry.pads_begin + geometry.pads_end):
        return source
    pads = [*[0] * lead, *geometry.pads_begin, *[0] * trail, *[0] * lead, *geometry.pads_end, *[0] * trail]
    return str(g.op("Pad", source, g.const(pads), hint="x_padded"))


def _window(g: GraphBuilder, source: str, geometry: Geometry, tap: tuple[int, ...], *, lead: int) -> str:
    """Emit the input positions that ``tap`` meets; the source itself where those are all."""
    padded = [sum(sides) for sides in zip(geometry.input, geometry.pads_begin, geometry.pads_end, strict=True)]
    starts = [k * d for k, d in zip(tap, geometry.dilations, strict=True)]
    ends = [b + (n - 1) * s + 1 for b, n, s in zip(starts, geometry.output, geometry.strides, strict=True)]
    if not any(starts) and ends == padded and set(geometry.strides) == {1}:
        return source
    axes = list(range(lead, lead + len(geometry.kernel)))
    bounds = [g.const(list(values)) for values in (starts, ends, axes, geometry.strides)]
    return str(g.op("Slice", source, *bounds, hint="window"))


InputGradient = Callable[[Context, Node, Geometry, str], str]
"""(context, node, geometry, dY) -> dX"""
LayerGradient = Callable[[Context, Node, Geometry, str], str]
"""(context, node, geometry, dY) -> dW"""


def convolution_rule(
    geometry_of: Callable[[ForwardGraph, Node], Geometry],
    input_gradient: InputGradient,
    weight_gradient: LayerGradient,
    forward: ForwardRule | None = None,
) -> Rule:
    """Return the rule of a convolution, ordinary or transposed, whose gradients of input and weight these give."""

    def wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
        groups = int(node.attributes.get("group", 1))
        return [Want(node.inputs[0], Use.WEIGHT_GRAD, groups=groups)] if 1 in wrt else []

    def backward(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
        g, geometry = ctx.g, geometry_of(ctx.graph, node)
        gradients: dict[int, str] = {}
        if 2 in wrt:
            axes = [0, *range(2, 2 + len(geometry.kernel))]
            gradients[2] = g.op("ReduceSum", dy, g.const(axes), keepdims=0, hint="db")
        # The weight gradient comes first: while it is computed, dX does not exist yet. Winograd's transforms are larger
        # than dX, and with them alive the weight gradient is the one that should not exist yet.
        transformed = node.attributes.get(FORM) == WINOGRAD
        for index in (0, 1) if transformed else (1, 0):
            if index in wrt:
                emit = (input_gradient, weight_gradient)[index]
                gradients[index] = emit(ctx, node, geometry, dy)
        return gradients

    return Rule(wants, backward, "its input, through a codec", forward)


def _forward(ctx: Context, node: Node) -> tuple[str, ...]:
    """Emit the convolution in its form; nothing is kept."""
    geometry = Geometry.of(ctx.graph, node)
    if not node.attributes.get(FORM):
        emit_node(ctx.g, node, ctx.graph)
    else:
        weight = emit_scaled_weight(ctx.g, node)
        _emit_form(ctx, node, geometry, node.inputs[0], weight, bias=node.input(2), reverse=False)
        ctx.g.nodes[-1].output[0] = node.outputs[0]
    return ()


def _input_gradient(ctx: Context, node: Node, geometry: Geometry, dy: str) -> str:
    weight = emit_scaled_weight(ctx.g, node)
    if node.attributes.get(FORM):
        return _emit_form(ctx, node, geometry, dy, weight, bias="", reverse=True)
    return transposed_convolution(ctx.g, dy, weight, geometry)


def _weight_gradient(ctx: Context, node: Node, geometry: Geometry, dy: str) -> str:
    dw = _gradient_of_scaled(ctx, node, geometry, dy)
    return str(ctx.g.op("Mul", dw, node.inputs[SCALE], hint="dw")) if node.input(SCALE) else dw


def _gradient_of_scaled(ctx: Context, node: Node, geometry: Geometry, dy: str) -> str:
    stored = ctx.stored(node.inputs[0], geometry.groups)
    shape = ctx.graph.shapes[node.inputs[1]]

    def rule(g: GraphBuilder, inner: Stored, dy: str) -> str:
        dw = _IN_FACTORS.get(inner.codec.name, _decoded_weight_gradient)(g, inner, dy, geometry)
        return dw if geometry.groups == 1 else str(g.op("Reshape", dw, g.const(list(shape)), hint="dw"))

    label = f"ConvWeightGrad_{geometry.label}_w{shape[0]}x{shape[1]}"
    return emit_weight_gradient(ctx, stored, dy, label, rule)


def _decoded_weight_gradient(g: GraphBuilder, stored: Stored, dy: str, geometry: Geometry) -> str:
    """Emit the default of every codec: decode, then the ordinary taps."""
    decoded = stored.codec.emit_decode(g, stored.encoded, stored.saved)
    return weight_gradient_taps(g, decoded, dy, geometry)


def emit_batch_rank_of_image(g: GraphBuilder, stored: Stored, dy: str, positions: Sequence[int]) -> str:
    """Emit Z1[r1,o,y,x] = Σ_b U¹[b,r1] · dY[b,o,y,x] (eq. 20); ``positions`` are the extents of y and x."""
    # The rank is unknown here, so the leading axis is copied and the channels are inferred.
    return str(g.op("Reshape", emit_batch_rank(g, stored, dy), g.const([0, -1, *positions]), hint="z1"))


def _svd_weight_gradient(g: GraphBuilder, stored: Stored, dy: str, geometry: Geometry) -> str:
    z1 = emit_batch_rank_of_image(g, stored, dy, geometry.output)
    return weight_gradient_taps(g, stored.encoded.stored[1], z1, geometry)


def _hosvd_weight_gradient(g: GraphBuilder, stored: Stored, dy: str, geometry: Geometry) -> str:
    if suits(geometry):
        return emit_depthwise_in_factors(g, stored, dy, geometry)
    z1 = emit_batch_rank_of_image(g, stored, dy, geometry.output)
    z3 = emit_spatial(g, stored.encoded, stored.saved)  # [r1, g, r2, *positions]
    if geometry.groups == 1:
        z3 = g.op("Reshape", z3, g.const([0, -1, *geometry.input]), hint="z3")
    z4 = weight_gradient_taps(g, z3, z1, geometry)  # [o, r2, *kernel] or [g, o, r2, *kernel] (eq. 23)
    if "c" not in stored.encoded.bases:
        return z4
    basis = stored.encoded.bases["c"]  # [g, c, r2]
    if geometry.groups == 1:  # eq. 24 as the paper has it, a 1×1 convolution: it writes dW where it belongs
        channels = stored.saved.channels
        kernel = g.op("Reshape", basis, g.const([channels, -1, *[1] * len(geometry.kernel)]), hint="basis")
        return str(g.op("Conv", z4, kernel, hint="dw"))
    outputs = geometry.out_channels // geometry.groups
    flat = g.op("Reshape", z4, g.const([geometry.groups, outputs, -1, math.prod(geometry.kernel)]), hint="z4")
    return str(g.op("MatMul", g.op("Unsqueeze", basis, g.const([1]), hint="basis"), flat, hint="dw"))


_IN_FACTORS = {Svd.name: _svd_weight_gradient, **for_tucker(_hosvd_weight_gradient)}

RULES = {"Conv": convolution_rule(Geometry.of, _input_gradient, _weight_gradient, _forward)}
