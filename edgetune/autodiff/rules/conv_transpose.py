"""Reverse rule of ConvTranspose, any number of spatial axes, groups, stride, dilation, padding, output padding.

Forward it spreads every input position over the taps: Y[b, o, x·s+k·d-p] += X[b,c,x] · W[c,o,k]. So

    dX           = convolution of dY with W
    dW[c,o,k]    = Σ_b,x X[b,c,x] · dY[b, o, x·s+k·d-p]      the taps of Conv with X and dY in each other's place
    db[o]        = Σ_b,y dY[b,o,y]

For a Tucker codec the taps run over the ranks, as in Conv:

    dW[c,o,k]    = Σ_r2 U²[c,r2] · taps(Z1 = U¹ᵀ·dY, Z3 = S ×₃U³ ...)[r2,o,k]
"""

from __future__ import annotations

from edgetune.autodiff.builder import GraphBuilder
from edgetune.autodiff.graph import ForwardGraph, Node
from edgetune.autodiff.rule import Context, Stored
from edgetune.autodiff.rules.conv import Geometry, convolution_rule, emit_batch_rank_of_image, weight_gradient_taps
from edgetune.autodiff.rules.weight_gradient import emit_weight_gradient, for_tucker
from edgetune.codecs import Svd
from edgetune.codecs.hosvd import emit_spatial
from edgetune.errors import UnsupportedOperatorError


def _geometry(graph: ForwardGraph, node: Node) -> Geometry:
    """Return the geometry of the convolution of which ``node`` is the transpose: from Y to X."""
    if node.attributes.get("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in node.attributes:
        raise UnsupportedOperatorError(
            f"ConvTranspose '{node.name}' leaves its padding to be found out (auto_pad, output_shape); give it as pads "
            "and output_padding"
        )
    weight = graph.shapes[node.inputs[1]]
    spatial = len(weight) - 2
    strides = tuple(node.attributes.get("strides", (1,) * spatial))
    extra = tuple(node.attributes.get("output_padding", (0,) * spatial))
    if any(more >= stride for more, stride in zip(extra, strides, strict=True)):
        raise UnsupportedOperatorError(
            f"ConvTranspose '{node.name}': its output_padding {extra} must be smaller than its strides {strides}; "
            "onnxruntime computes no other"
        )
    pads = tuple(node.attributes.get("pads", (0,) * (2 * spatial)))
    return Geometry(
        groups=int(node.attributes.get("group", 1)),
        strides=strides,
        dilations=tuple(node.attributes.get("dilations", (1,) * spatial)),
        pads_begin=pads[:spatial],
        pads_end=pads[spatial:],
        kernel=tuple(weight[2:]),
        input=graph.shapes[node.outputs[0]][2:],
        output=graph.shapes[node.inputs[0]][2:],
        in_channels=graph.shapes[node.outputs[0]][1],
        out_channels=weight[0],
    )


def _convolution(ctx: Context, node: Node, geometry: Geometry, dy: str) -> str:
    """Emit dX. An output padding below the stride leaves no position over."""
    name = ctx.g.op(
        "Conv",
        dy,
        node.inputs[1],
        hint="dx",
        group=geometry.groups,
        strides=list(geometry.strides),
        dilations=list(geometry.dilations),
        pads=[*geometry.pads_begin, *geometry.pads_end],
        kernel_shape=list(geometry.kernel),
    )
    return str(name)


def _weight_gradient(ctx: Context, node: Node, geometry: Geometry, dy: str) -> str:
    stored = ctx.stored(node.inputs[0], geometry.groups)
    shape = ctx.graph.shapes[node.inputs[1]]

    def rule(g: GraphBuilder, inner: Stored, dy: str) -> str:
        dw = _IN_FACTORS.get(inner.codec.name, _decoded_weight_gradient)(g, inner, dy, geometry)
        return str(g.op("Reshape", dw, g.const(list(shape)), hint="dw"))

    label = f"ConvTransposeWeightGrad_{geometry.label}_w{shape[0]}x{shape[1]}"
    return emit_weight_gradient(ctx, stored, dy, label, rule)


def _decoded_weight_gradient(g: GraphBuilder, stored: Stored, dy: str, geometry: Geometry) -> str:
    """Emit the default of every codec: decode, then the taps."""
    decoded = stored.codec.emit_decode(g, stored.encoded, stored.saved)
    return weight_gradient_taps(g, dy, decoded, geometry)


def _svd_weight_gradient(g: GraphBuilder, stored: Stored, dy: str, geometry: Geometry) -> str:
    z1 = emit_batch_rank_of_image(g, stored, dy, geometry.input)
    return weight_gradient_taps(g, z1, stored.encoded.stored[1], geometry)


def _hosvd_weight_gradient(g: GraphBuilder, stored: Stored, dy: str, geometry: Geometry) -> str:
    z1 = emit_batch_rank_of_image(g, stored, dy, geometry.input)
    z3 = emit_spatial(g, stored.encoded, stored.saved)  # [r1, g, r2, *positions]
    if geometry.groups == 1:
        z3 = g.op("Reshape", z3, g.const([0, -1, *geometry.output]), hint="z3")
    z4 = weight_gradient_taps(g, z1, z3, geometry)  # [r2, o, *kernel] or [g, r2, o, *kernel]
    if "c" not in stored.encoded.bases:
        return z4
    flat = g.op("Reshape", z4, g.const([0, -1] if geometry.groups == 1 else [0, 0, -1]), hint="z4")
    return str(g.op("MatMul", stored.encoded.bases["c"], flat, hint="dw"))


_IN_FACTORS = {Svd.name: _svd_weight_gradient, **for_tucker(_hosvd_weight_gradient)}

RULES = {"ConvTranspose": convolution_rule(_geometry, _convolution, _weight_gradient)}
