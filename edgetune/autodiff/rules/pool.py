"""Reverse rules of pooling. MaxPool keeps one byte per output: which element of the window won."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from edgetune.autodiff.graph import ForwardGraph, Node
from edgetune.autodiff.rule import Context, Rule, Want, nothing
from edgetune.codecs.base import Array, Use

_FLOAT, _UINT8, _INT32, _INT64 = 1, 2, 6, 7  # onnx.TensorProto


class Window:
    """The static numbers of one pooling operator; one entry per spatial axis."""

    def __init__(self, graph: ForwardGraph, node: Node) -> None:
        self.kernel = tuple(int(k) for k in node.attributes["kernel_shape"])
        spatial = len(self.kernel)
        pads = tuple(node.attributes.get("pads", (0,) * (2 * spatial)))
        self.begin, self.end = pads[:spatial], pads[spatial:]
        self.strides = tuple(node.attributes.get("strides", (1,) * spatial))
        self.dilations = tuple(node.attributes.get("dilations", (1,) * spatial))
        self.channels, *extents = graph.shapes[node.inputs[0]][1:]
        self.input = tuple(extents)
        self.output = graph.shapes[node.outputs[0]][2:]

    def origins(self, axis: int) -> Array:
        """Return where each window begins along ``axis``, shaped to broadcast over the output positions."""
        starts = np.arange(self.output[axis], dtype=np.int64) * self.strides[axis] - self.begin[axis]
        return np.asarray(starts.reshape([-1 if i == axis else 1 for i in range(len(self.kernel))]))


# MaxPool: dX[argmax of the window] += dY. The winner's global index (int64) is reduced to its place in the window.
def _max_forward(ctx: Context, node: Node) -> tuple[str, ...]:
    g, window = ctx.g, Window(ctx.graph, node)
    indices = g.fresh(f"{node.name}.indices")
    # storage_order changes nothing but the order in which the indices count
    attributes = {key: value for key, value in node.attributes.items() if key != "storage_order"}
    full = Node(node.op, node.name, node.inputs, (node.outputs[0], indices), attributes)
    g.nodes.append(full.to_proto())
    position = g.op("Mod", indices, g.const(np.array(math.prod(window.input), np.int64)), hint="position")
    place = ""
    for axis in range(len(window.kernel)):
        inner, is_last = math.prod(window.input[axis + 1 :]), axis + 1 == len(window.kernel)
        row = g.op("Div", position, g.const(np.array(inner, np.int64)), hint="row") if not is_last else position
        if not is_last:
            position = g.op("Mod", position, g.const(np.array(inner, np.int64)), hint="position")
        offset = g.op("Sub", row, g.const(window.origins(axis)), hint="offset")
        if window.dilations[axis] > 1:
            offset = g.op("Div", offset, g.const(np.array(window.dilations[axis], np.int64)), hint="offset")
        scale = g.const(np.array(math.prod(window.kernel[axis + 1 :]), np.int64))
        term = g.op("Mul", offset, scale, hint="place")
        place = g.op("Add", place, term, hint="place") if place else term
    narrow = _UINT8 if math.prod(window.kernel) <= 256 else _INT32
    return (g.op("Cast", place, to=narrow, hint="winner"),)


def _max_backward(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, window = ctx.g, Window(ctx.graph, node)
    place = g.op("Cast", ctx.kept(node)[0], to=_INT64, hint="place")
    position = ""
    for axis in range(len(window.kernel)):
        inner, is_last = math.prod(window.kernel[axis + 1 :]), axis + 1 == len(window.kernel)
        tap = g.op("Div", place, g.const(np.array(inner, np.int64)), hint="tap") if not is_last else place
        if not is_last:
            place = g.op("Mod", place, g.const(np.array(inner, np.int64)), hint="place")
        step = g.op("Mul", tap, g.const(np.array(window.dilations[axis], np.int64)), hint="step")
        row = g.op("Add", step, g.const(window.origins(axis)), hint="row")
        scale = g.const(np.array(math.prod(window.input[axis + 1 :]), np.int64))
        term = g.op("Mul", row, scale, hint="position")
        position = g.op("Add", position, term, hint="position") if position else term
    outputs, inputs = math.prod(window.output), math.prod(window.input)
    flat = g.const([0, window.channels, outputs])
    updates = g.op("Reshape", dy, flat, hint="updates")
    # Zeros of the input's size, made from dY: their batch is known only at run time.
    zeros = g.op("Pad", g.op("Mul", updates, g.const(0.0), hint="zeros"), g.const([0, 0, 0, 0, 0, inputs - outputs]))
    position = g.op("Reshape", position, flat, hint="position")
    dx = g.op("ScatterElements", zeros, position, updates, axis=2, reduction="add", hint="dx_flat")
    return {0: g.op("Reshape", dx, g.const([0, window.channels, *window.input]), hint="dx")}


# AveragePool: every output's gradient, divided by its count, is spread over its window.
def _average_counts(window: Window, include_pad: bool) -> Array:
    """Return [1, 1, *output]: 1 / (number of elements averaged)."""
    counts = np.zeros(window.output, np.float32)
    for tap in itertools.product(*(range(k) for k in window.kernel)):
        inside = np.ones(window.output, bool)
        for axis, k in enumerate(tap):
            row = window.origins(axis) + k * window.dilations[axis]
            low, high = (
                (-window.begin[axis], window.input[axis] + window.end[axis]) if include_pad else (0, window.input[axis])
            )
            inside = inside & (row >= low) & (row < high)
        counts += inside
    return (1.0 / np.maximum(counts, 1.0)).astype(np.float32)[None, None]


def _average_backward(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, window = ctx.g, Window(ctx.graph, node)
    leftover = [
        size + begin + end - dilation * (kernel - 1) - 1 - stride * (out - 1)
        for size, begin, end, dilation, kernel, stride, out in zip(
            window.input, window.begin, window.end, window.dilations, window.kernel, window.strides, window.output,
            strict=True,
        )
    ]  # fmt: skip
    share = _average_counts(window, bool(node.attributes.get("count_include_pad", 0)))
    scaled = g.op("Mul", dy, g.const(share), hint="share")
    planes = g.op("Reshape", scaled, g.const([-1, 1, *window.output]), hint="planes")
    spread = g.op(
        "ConvTranspose",
        planes,
        g.const(np.ones((1, 1, *window.kernel), np.float32)),
        hint="spread",
        strides=list(window.strides),
        dilations=list(window.dilations),
        # with ceil_mode the last window may leave the padded input (leftover < 0): that part is cut off
        pads=[*window.begin, *(end + max(-rest, 0) for end, rest in zip(window.end, leftover, strict=True))],
        output_padding=[max(rest, 0) for rest in leftover],
    )
    return {0: g.op("Reshape", spread, g.const([-1, window.channels, *window.input]), hint="dx")}


# GlobalAveragePool: dX = dY / (h·w) everywhere
def _global_average(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    shape = ctx.graph.shapes[node.inputs[0]]
    share = ctx.g.op("Mul", dy, ctx.g.const(1.0 / math.prod(shape[2:])), hint="share")
    return {0: ctx.spread(share, shape)}


# GlobalMaxPool: dX = dY where x is the largest of its plane, shared evenly among equals (as torch.amax)
def _global_max_wants(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    return [Want(node.inputs[0], Use.VALUE), Want(node.outputs[0], Use.VALUE)]


def _global_max(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    g, axes = ctx.g, list(range(2, len(ctx.graph.shapes[node.inputs[0]])))
    equal = g.op("Equal", ctx.value(node.inputs[0]), ctx.value(node.outputs[0]), hint="equal")
    factor = g.op("Cast", equal, to=_FLOAT, hint="factor")
    share = g.op("Div", dy, g.op("ReduceSum", factor, g.const(axes), keepdims=1, hint="count"), hint="share")
    return {0: g.op("Mul", factor, share, hint="dx")}


RULES = {
    "MaxPool": Rule(nothing, _max_backward, "one byte per output", forward=_max_forward),
    "AveragePool": Rule(nothing, _average_backward, "nothing"),
    "GlobalAveragePool": Rule(nothing, _global_average, "nothing"),
    "GlobalMaxPool": Rule(_global_max_wants, _global_max, "its input and output"),
}
