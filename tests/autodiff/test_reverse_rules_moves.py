"""Rules of operators that move, pick, pool and resample elements against finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgetune.autodiff.rules.resize import interpolation_matrices
from edgetune.bundle import Array
from edgetune.errors import UnsupportedOperatorError
from tests.autodiff.checker import check_gradients, forward_graph, forward_outputs, node, normal, vector

FEW = settings(max_examples=6, deadline=None, derandomize=True)
IMAGE = st.tuples(st.integers(1, 3), st.integers(3, 6), st.integers(3, 6))


def number(value: float) -> Array:
    return np.array(value, np.float32)


# -- pooling ----------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data(), rank=st.sampled_from([1, 2, 2, 3]))
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_pooling(op: str, data: st.DataObject, rank: int) -> None:
    def each(low: int, high: int) -> list[int]:
        return data.draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))

    size, kernel, strides = each(3, 6 - rank // 2), each(1, 3), each(1, 3)
    pads = [data.draw(st.integers(0, k - 1)) for k in (*kernel, *kernel)]
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": strides, "pads": pads}
    attributes["ceil_mode"] = data.draw(st.integers(0, 1))
    if op == "MaxPool":
        attributes["dilations"] = each(1, 2)
        attributes["storage_order"] = data.draw(st.integers(0, 1))
    else:
        attributes["count_include_pad"] = data.draw(st.integers(0, 1))
    reach = [d * (k - 1) + 1 for d, k in zip(attributes.get("dilations", (1,) * rank), kernel, strict=True)]
    assume(all(n + pads[i] + pads[i + rank] >= reach[i] for i, n in enumerate(size)))
    # onnx and the runtimes disagree on whether a last window that begins behind the input counts
    last = [-(-(n + pads[i] + pads[i + rank] - reach[i]) // strides[i]) * strides[i] for i, n in enumerate(size)]
    ends = [n + pads[i] for i, n in enumerate(size)]
    assume(not attributes["ceil_mode"] or all(start < end for start, end in zip(last, ends, strict=True)))
    check_gradients([node(op, ["a"], **attributes)], (2, *size))


@pytest.mark.parametrize("shape", [(2, 5, 1), (2, 1, 5), (2, 4, 4)])
@pytest.mark.parametrize("kernel", [(2, 1), (1, 2), (3, 1), (1, 1)])
def test_max_pooling_of_one_row_or_column(shape: tuple[int, ...], kernel: tuple[int, int]) -> None:
    if all(n >= k for n, k in zip(shape[1:], kernel, strict=True)):
        check_gradients([node("MaxPool", ["a"], kernel_shape=kernel)], shape)


@FEW
@given(shape=IMAGE, spatial=st.integers(1, 2))
@pytest.mark.parametrize("op", ["GlobalAveragePool", "GlobalMaxPool"])
def test_global_pooling(op: str, shape: tuple[int, ...], spatial: int) -> None:
    check_gradients([node(op, ["a"])], shape[: 1 + spatial])


# -- moving elements --------------------------------------------------------------------------------------------------

Case = tuple[list[onnx.NodeProto], dict[str, Array]]
MOVES: dict[str, Case] = {
    "Reshape": ([node("Reshape", ["a", "to"])], {"to": vector(-1, 6, 4)}),
    "Reshape-zero": ([node("Reshape", ["a", "to"])], {"to": vector(0, -1)}),
    "Flatten": ([node("Flatten", ["a"])], {}),
    "Unsqueeze": ([node("Unsqueeze", ["a", "axes"])], {"axes": vector(1, -1)}),
    "Squeeze": (
        [node("Unsqueeze", ["a", "axes"], "wide"), node("Squeeze", ["wide", "axes"])],
        {"axes": vector(2)},
    ),
    "Transpose": ([node("Transpose", ["a"], perm=[0, 2, 3, 1])], {}),
    "Transpose-two": (
        [node("Transpose", ["a"], "t", perm=[0, 3, 1, 2]), node("Transpose", ["t"], perm=[0, 3, 2, 1])],
        {},
    ),
    "Batch-in-the-middle": (
        [
            node("Transpose", ["a"], "t", perm=[1, 0, 3, 2]),
            node("Reshape", ["t", "to"], "r"),
            node("Relu", ["r"], "s"),
            node("Reshape", ["s", "back"], "u"),
            node("Transpose", ["u"], perm=[1, 0, 3, 2]),
        ],
        {"to": vector(2, -1, 12), "back": vector(2, -1, 4, 3)},
    ),
    "Concat-last": ([node("Mul", ["a", "a"], "m"), node("Concat", ["m", "a"], axis=-1)], {}),
    "Concat": ([node("Mul", ["x", "x"], "fixed"), node("Concat", ["a", "fixed", "a"], axis=2)], {}),
    "Split": (
        [helper.make_node("Split", ["a", "parts"], ["p", "q"], axis=2), node("Concat", ["q", "p", "q"], axis=2)],
        {"parts": vector(1, 2)},
    ),
    "Split-unread": (
        [helper.make_node("Split", ["a", "parts"], ["p", "y", "r"], axis=-1)],
        {"parts": vector(1, 2, 1)},
    ),
    "Split-equal": ([helper.make_node("Split", ["a"], ["p", "y"], axis=1, num_outputs=2)], {}),
    "Expand": (
        [node("Unsqueeze", ["a", "axes"], "w"), node("Expand", ["w", "to"])],
        {"axes": vector(1), "to": vector(5, 1, 1, 1)},
    ),
    "Expand-more-axes": (
        [node("Expand", ["a", "to"], "w"), node("Transpose", ["w"], perm=[1, 0, 2, 3, 4])],
        {"to": vector(3, 1, 1, 1, 1)},
    ),
    "Tile": ([node("Tile", ["a", "times"])], {"times": vector(1, 3, 1, 2)}),
    "Tile-batch": (
        [node("Tile", ["a", "times"], "t"), node("Reshape", ["t", "to"])],
        {"times": vector(3, 1, 1, 1), "to": vector(-1, 72)},
    ),
    "Tile-once": ([node("Tile", ["a", "times"])], {"times": vector(1, 1, 1, 1)}),
    "Pad": ([node("Pad", ["a", "pads"])], {"pads": vector(0, 0, 2, 1, 0, 1, 0, 3)}),
    "Pad-nothing": ([node("Pad", ["a", "pads"])], {"pads": vector(0, 0, 0, 0, 0, 0, 0, 0)}),
    "Pad-crop": ([node("Pad", ["a", "pads"])], {"pads": vector(0, 0, -1, 1, 0, 0, 0, -2)}),
    "Pad-value": (
        [node("Pad", ["a", "pads", "value"])],
        {"pads": vector(0, 1, 0, 0, 0, 0, 1, 0), "value": number(2.5)},
    ),
    "Pad-axes": (
        [node("Pad", ["a", "pads", "", "axes"])],
        {"pads": vector(1, 2, 0, 1), "axes": vector(-1, 2)},
    ),
    "Pad-reflect": ([node("Pad", ["a", "pads"], mode="reflect")], {"pads": vector(0, 0, 2, 1, 0, 1, 2, 3)}),
    "Pad-edge": ([node("Pad", ["a", "pads"], mode="edge")], {"pads": vector(0, 0, 2, 1, 0, 0, 5, 3)}),
    "SpaceToDepth": (
        [node("Pad", ["a", "pads"], "even"), node("SpaceToDepth", ["even"], blocksize=2)],
        {"pads": vector(0, 0, 0, 0, 0, 0, 1, 0)},
    ),
    "Trilu": ([node("Trilu", ["a"])], {}),
    "Trilu-lower": ([node("Trilu", ["a", "k"], upper=0)], {"k": np.array(1, np.int64)}),
    "CumSum": ([node("CumSum", ["a", "axis"])], {"axis": np.array(2, np.int64)}),
    "CumSum-other-end": (
        [node("CumSum", ["a", "axis"], exclusive=1, reverse=1)],
        {"axis": np.array(-1, np.int64)},
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_moving_elements(name: str) -> None:
    nodes, constants = MOVES[name]
    check_gradients(nodes, (2, 3, 4), {}, constants)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space(mode: str) -> None:
    check_gradients([node("DepthToSpace", ["a"], blocksize=2, mode=mode)], (8, 2, 3))


# -- picking elements -------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_slice(data: st.DataObject) -> None:
    shape = (4, 5, 3)
    axes = data.draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3, unique=True))
    starts, ends, steps = [], [], []
    for axis in axes:
        step = data.draw(st.sampled_from([1, 1, 2, 3, -1, -2]))
        start = data.draw(st.integers(-6, 6))
        end = data.draw(st.one_of(st.integers(-6, 6), st.just((2**63 - 1) * (1 if step > 0 else -1))))
        assume(len(range(shape[axis - 1])[start:end:step]) > 0)
        starts.append(start)
        ends.append(end)
        steps.append(step)
    given_axes = [axis - 4 if data.draw(st.booleans()) else axis for axis in axes]
    constants = {"starts": starts, "ends": ends, "axes": given_axes, "steps": steps}
    check_gradients([node("Slice", ["a", *constants])], shape, {}, {k: vector(*v) for k, v in constants.items()})


def test_slice_of_leading_axes_and_of_the_whole_batch() -> None:
    slices = {"starts": vector(0, 1), "ends": vector(2**63 - 1, 3)}
    check_gradients([node("Slice", ["a", *slices])], (4, 3), {}, slices)


def test_a_part_of_the_batch_is_refused() -> None:
    slices = {"starts": vector(1), "ends": vector(2)}
    with pytest.raises(UnsupportedOperatorError, match="independent"):
        check_gradients([node("Slice", ["a", *slices])], (4, 3), {}, slices)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(axis=st.sampled_from([1, 2, -1]), data=st.data())
def test_gather_of_constant_indices(axis: int, data: st.DataObject) -> None:
    shape = (4, 3)
    count = (0, *shape)[axis]
    indices = np.array(data.draw(st.lists(st.integers(-count, count - 1), min_size=1, max_size=9)), np.int64)
    form = data.draw(st.sampled_from(["vector", "matrix", "scalar"]))
    indices = indices[None, :] if form == "matrix" else np.array(indices[0]) if form == "scalar" else indices
    check_gradients([node("Gather", ["a", "i"], axis=axis)], shape, {}, {"i": indices})


def test_a_gather_that_picks_one_element_often() -> None:
    often = vector(0, 0, 0, 0, 0, 0, 2)
    check_gradients([node("Gather", ["a", "i"], axis=1)], (4, 3), {}, {"i": often})
    check_gradients([node("Gather", ["a", "i"], axis=2)], (4, 3), {}, {"i": often})


@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.INT32])
def test_an_embedding(kind: int) -> None:
    nodes = [
        node("Mul", ["x", "few"], "f"), node("Floor", ["f"], "g"), node("Mod", ["g", "rows"], "m"),
        node("Cast", ["m"], "i", to=kind), node("Gather", ["table", "i"], "e"), node("Unsqueeze", ["a", "last"], "u"),
        node("Mul", ["e", "u"]),
    ]  # fmt: skip
    constants = {"few": number(3.3), "rows": number(4.0), "last": vector(-1)}
    nodes[2].attribute.append(helper.make_attribute("fmod", 1))
    nodes.insert(2, node("Abs", ["g"], "h"))
    nodes[3].input[0] = "h"
    check_gradients(nodes, (3, 2), {"table": normal((4, 5))}, constants)


def test_a_table_indexed_on_another_axis_by_the_data_and_an_activation_too() -> None:
    best = node("ArgMax", ["x"], "i", axis=2, keepdims=0)
    nodes = [best, node("Gather", ["table", "i"], "e", axis=1), node("Transpose", ["e"], "f", perm=[1, 2, 0, 3])]
    nodes += [node("Unsqueeze", ["a", "axes"], "u"), node("Mul", ["f", "u"])]
    check_gradients(nodes, (2, 4), {"table": normal((2, 4, 4))}, {"axes": vector(2)})
    nodes = [node("ArgMax", ["p"], "i", axis=0, keepdims=0), node("Gather", ["a", "i"], axis=2)]
    check_gradients(nodes, (3, 4), {}, {"p": normal((4, 5))})


def test_gather_elements() -> None:
    nodes = [node("TopK", ["x", "two"], "v", axis=2), node("GatherElements", ["a", "i"], axis=2)]
    nodes[0].output.append("i")
    check_gradients(nodes, (3, 4), {}, {"two": vector(2)})
    twice = [*nodes[:1], node("Concat", ["i", "i"], "ii", axis=2), node("GatherElements", ["a", "ii"], axis=2)]
    check_gradients(twice, (3, 4), {}, {"two": vector(2)})
    constant = {"i": np.array([[2, 0, 1], [1, 1, 1]], np.int64)}
    nodes = [node("GatherElements", ["p", "i"], "g", axis=1), node("MatMul", ["a", "g"])]
    check_gradients(nodes, (4, 2), {"p": normal((2, 3))}, constant)


def test_gather_nd() -> None:
    nodes = [node("Transpose", ["a"], "t", perm=[1, 2, 0]), node("GatherND", ["t", "i"], "g")]
    nodes += [node("Transpose", ["g"], perm=[1, 0])]
    check_gradients(nodes, (3, 4), {}, {"i": np.array([[0, 1], [2, 3], [0, 1]], np.int64)})


def test_gather_nd_within_a_batch_is_refused() -> None:
    with pytest.raises(UnsupportedOperatorError, match="GatherElements"):
        check_gradients([node("GatherND", ["a", "i"])], (3, 4), {}, {"i": np.array([[0, 1], [1, 2]], np.int64)})


@pytest.mark.parametrize("axis", [1, -1])
def test_top_k(axis: int) -> None:
    best = helper.make_node("TopK", ["a", "two"], ["y", "i"], axis=axis)
    check_gradients([best], (3, 4), {}, {"two": vector(2)})


@pytest.mark.parametrize("reduction", ["none", "add"])
def test_scatter_elements(reduction: str) -> None:
    # twice the same place: allowed only where the updates are added
    column = [[0], [2], [1]] if reduction == "none" else [[1], [1], [1]]
    nodes = [
        node("Slice", ["a", "one", "three", "two"], "u"), node("Mul", ["u", "u"], "v"),
        node("Expand", ["column", "to"], "i"), node("Add", ["i", "nothing"], "j"),
        node("ScatterElements", ["a", "j", "v"], axis=2, reduction=reduction),
    ]  # fmt: skip
    constants = {
        "one": vector(1), "three": vector(2), "two": vector(2), "column": np.array([column] * 2, np.int64),
        "to": vector(2, 3, 1), "nothing": np.array(0, np.int64),
    }  # fmt: skip
    check_gradients(nodes, (3, 4), {}, constants)


@pytest.mark.parametrize("reduction", ["none", "add"])
def test_scatter_nd(reduction: str) -> None:
    nodes = [
        node("Transpose", ["a"], "t", perm=[1, 0]), node("Mul", ["a", "p"], "m"),
        node("Transpose", ["m"], "u", perm=[1, 0]),
        node("ScatterND", ["base", "i", "u"], "s", reduction=reduction), node("Concat", ["s", "t"], "c", axis=0),
        node("Transpose", ["c"], perm=[1, 0]), node("Mul", ["t", "t"], "base"),
    ]  # fmt: skip
    nodes = [nodes[0], nodes[-1], *nodes[1:-1]]
    places = np.array([[2], [0], [1]] if reduction == "none" else [[2], [0], [2]], np.int64)
    check_gradients(nodes, (3,), {"p": normal((3,))}, {"i": places})


# -- resampling -------------------------------------------------------------------------------------------------------

TRANSFORMATIONS = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]
NEAREST = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]


def drawn_resize(data: st.DataObject) -> tuple[tuple[int, ...], onnx.NodeProto, dict[str, Array]]:
    """Return the shape of a sample, a Resize node and its constants."""
    mode = data.draw(st.sampled_from(["nearest", "linear", "cubic"]))
    rank = 2 if mode == "cubic" else data.draw(st.integers(1, 3))
    size = tuple(data.draw(st.lists(st.integers(1 if mode != "cubic" else 3, 5), min_size=rank, max_size=rank)))
    attributes: dict[str, Any] = {"mode": mode}
    attributes["coordinate_transformation_mode"] = data.draw(st.sampled_from(TRANSFORMATIONS))
    if mode == "nearest":
        attributes["nearest_mode"] = data.draw(st.sampled_from(NEAREST))
    if mode == "cubic":
        attributes |= {"cubic_coeff_a": data.draw(st.sampled_from([-0.5, -0.75]))}
        attributes |= {"exclude_outside": data.draw(st.integers(0, 1))}
    channels = 2
    if data.draw(st.booleans()):
        factors = data.draw(st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0]), min_size=rank, max_size=rank))
        assume(all(int(f * n) >= 1 for f, n in zip(factors, size, strict=True)))
        constants = {"scales": np.array([1.0, 1.0, *factors], np.float32)}
        return (channels, *size), node("Resize", ["a", "", "scales"], **attributes), constants
    sizes = data.draw(st.lists(st.integers(1, 7), min_size=rank, max_size=rank))
    axes = list(range(2, 2 + rank))
    return (channels, *size), node("Resize", ["a", "", "", "sizes"], axes=axes, **attributes), {"sizes": vector(*sizes)}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_interpolation_matrices_are_what_the_runtime_computes(data: st.DataObject) -> None:
    shape, resize, constants = drawn_resize(data)
    x = normal((2, *shape))
    nodes = [node("Identity", ["x"], "a"), resize]
    (found,) = forward_outputs(nodes, x, constants, ["y"])
    graph = forward_graph([*nodes, node("Identity", ["y"], "z")], shape, {}, constants)
    expected = x
    for axis, matrix in interpolation_matrices(graph, graph.nodes[1]).items():
        expected = np.moveaxis(np.tensordot(matrix, expected, (1, axis)), 0, axis)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_resize(data: st.DataObject) -> None:
    shape, resize, constants = drawn_resize(data)
    # For one element, onnx's evaluator takes the coordinate -1/2; the standard's text and the runtime take 0.
    graph = forward_graph([node("Identity", ["x"], "a"), resize, node("Identity", ["y"], "z")], shape, {}, constants)
    half = graph.nodes[1].attributes["coordinate_transformation_mode"] == "pytorch_half_pixel"
    assume(not half or 1 not in graph.shapes["y"])
    check_gradients([resize], shape, {}, constants)


def test_resize_of_a_cropped_region() -> None:
    constants = {"roi": np.array([0.2, -0.1, 0.8, 1.1], np.float32), "sizes": vector(3, 6)}
    resize = node(
        "Resize", ["a", "roi", "", "sizes"], mode="linear", coordinate_transformation_mode="tf_crop_and_resize",
        extrapolation_value=0.5, axes=[2, 3],
    )  # fmt: skip
    check_gradients([resize], (2, 5, 4), {}, constants)


def test_resize_with_a_filter_is_refused() -> None:
    resize = node("Resize", ["a", "", "", "sizes"], mode="linear", antialias=1, axes=[2, 3])
    with pytest.raises(UnsupportedOperatorError, match="antialias"):
        check_gradients([resize], (2, 6, 6), {}, {"sizes": vector(3, 3)})
