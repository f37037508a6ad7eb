"""Every reverse rule against finite differences; shapes are drawn, so that no size is special."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper

from edgetune.autodiff.builder import FunctionLibrary, GraphBuilder
from edgetune.autodiff.graph import Node
from edgetune.autodiff.losses import LossConfig, loss_from
from edgetune.autodiff.reverse import TrainedLayer, emit_gradients
from edgetune.autodiff.rule import Context, Rule, nothing
from edgetune.autodiff.rules import RULES
from edgetune.bundle import Array
from edgetune.codecs import Dense
from edgetune.errors import ExportError, UnsupportedOperatorError
from tests.autodiff.checker import check_gradients, forward_graph

FEW = settings(max_examples=8, deadline=None, derandomize=True)
EXTENT = st.integers(1, 5)
IMAGE = st.tuples(st.integers(1, 3), st.integers(3, 6), st.integers(3, 6))


def node(op: str, inputs: list[str], output: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], **attributes)


def normal(shape: tuple[int, ...], seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def vector(*values: int) -> Array:
    return np.array(values, np.int64)


# -- weight layers ----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data(), groups=st.integers(1, 3), per_group=st.tuples(st.integers(1, 2), st.integers(1, 2)))
def test_conv(data: st.DataObject, groups: int, per_group: tuple[int, int]) -> None:
    pair = st.tuples(st.integers(1, 2), st.integers(1, 2))
    kernel = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    strides, dilations = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3))), data.draw(pair)
    pads = data.draw(st.lists(st.integers(0, 2), min_size=4, max_size=4))
    size = data.draw(st.tuples(st.integers(3, 7), st.integers(3, 7)))
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    assume(all(n + pads[i] + pads[i + 2] >= reach[i] for i, n in enumerate(size)))
    inputs, outputs = groups * per_group[0], groups * per_group[1]
    parameters = {"w": normal((outputs, per_group[0], *kernel)), "bias": normal((outputs,))}
    conv = node(
        "Conv", ["a", "w", "bias"], group=groups, strides=strides, dilations=dilations, pads=pads, kernel_shape=kernel
    )
    check_gradients([conv], (inputs, *size), parameters)


@FEW
@given(length=st.integers(4, 7), stride=st.integers(1, 2), pads=st.tuples(st.integers(0, 2), st.integers(0, 2)))
def test_conv_of_one_spatial_axis(length: int, stride: int, pads: tuple[int, int]) -> None:
    conv = node("Conv", ["a", "w"], strides=[stride], pads=list(pads))
    check_gradients([conv], (2, length), {"w": normal((3, 2, 3))})


@FEW
@given(
    data=st.data(), channels=st.tuples(*[st.integers(1, 3)] * 2), kernel=st.tuples(*[st.integers(1, 3)] * 2),
    strides=st.tuples(*[st.integers(1, 2)] * 2), pads=st.tuples(*[st.integers(0, 1)] * 4),
)  # fmt: skip
def test_conv_transpose(
    data: st.DataObject,
    channels: tuple[int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, ...],
) -> None:
    """Without groups, which onnx's own evaluator gets wrong; those are held to torch in test_weight_layers.py."""
    extra = [data.draw(st.integers(0, stride - 1)) for stride in strides]
    spread = node(
        "ConvTranspose", ["a", "w", "bias"], strides=strides, pads=pads, kernel_shape=kernel, output_padding=extra
    )
    parameters = {"w": normal((*channels, *kernel)), "bias": normal((channels[1],))}
    check_gradients([spread], (channels[0], 3, 4), parameters)


@FEW
@given(
    sizes=st.tuples(EXTENT, EXTENT), transposed=st.integers(0, 1), alpha=st.sampled_from([1.0, 0.5, -1.5]),
    beta=st.sampled_from([1.0, 2.0]), bias=st.sampled_from(["none", "vector", "row", "one"]),
)  # fmt: skip
def test_gemm(sizes: tuple[int, int], transposed: int, alpha: float, beta: float, bias: str) -> None:
    inputs, outputs = sizes
    parameters = {"w": normal((outputs, inputs) if transposed else (inputs, outputs))}
    shapes: dict[str, tuple[int, ...]] = {"vector": (outputs,), "row": (1, outputs), "one": (1,)}
    if bias in shapes:
        parameters["bias"] = normal(shapes[bias])
    gemm = node("Gemm", ["a", *parameters], transB=transposed, alpha=alpha, beta=beta)
    check_gradients([gemm], (inputs,), parameters)


@FEW
@given(lead=st.lists(EXTENT, max_size=2), sizes=st.tuples(EXTENT, EXTENT))
def test_matmul_with_a_weight(lead: list[int], sizes: tuple[int, int]) -> None:
    check_gradients([node("MatMul", ["a", "w"])], (*lead, sizes[0]), {"w": normal(sizes)})


@FEW
@given(heads=st.integers(1, 3), rows=EXTENT, columns=EXTENT)
def test_matmul_of_two_activations(heads: int, rows: int, columns: int) -> None:
    nodes = [
        node("Mul", ["a", "scale"], "other"),
        node("Transpose", ["other"], "swapped", perm=[0, 1, 3, 2]),
        node("MatMul", ["a", "swapped"]),
    ]
    check_gradients(nodes, (heads, rows, columns), {"scale": normal((heads, 1, columns))}, scale=0.3)


def test_matmul_with_a_weight_of_3_axes() -> None:
    check_gradients([node("MatMul", ["a", "w"])], (2, 3), {"w": normal((1, 3, 4))})


# -- element-wise -----------------------------------------------------------------------------------------------------


@FEW
@given(op=st.sampled_from(["Add", "Sub", "Mul"]), shape=st.tuples(EXTENT, EXTENT, EXTENT), data=st.data())
@pytest.mark.parametrize("parameter_first", [True, False])
def test_arithmetic_with_broadcasting(
    parameter_first: bool, op: str, shape: tuple[int, ...], data: st.DataObject
) -> None:
    kept = data.draw(st.tuples(*[st.booleans()] * len(shape)))
    lead = data.draw(st.integers(0, len(shape)))
    small = tuple(n if keep else 1 for n, keep in zip(shape, kept, strict=True))[lead:]
    names = ["p", "a"] if parameter_first else ["a", "p"]
    check_gradients([node(op, names)], shape, {"p": normal(small)})


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul"])
def test_arithmetic_of_one_tensor_with_itself_and_of_two_activations(op: str) -> None:
    check_gradients([node("Mul", ["a", "p"], "other"), node(op, ["other", "a"])], (3, 4), {"p": normal((4,))})
    check_gradients([node("Mul", ["a", "p"], "other"), node(op, ["other", "other"])], (3, 4), {"p": normal((4,))})


ACTIVATIONS: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {
    "Relu": ("Relu", {}, {}),
    "Clip": ("Clip", {}, {"low": -0.5, "high": 0.9}),
    "Clip-low": ("Clip", {}, {"low": 0.2}),
    "Clip-high": ("Clip", {}, {"": 0.0, "high": 0.2}),
    "Clip-none": ("Clip", {}, {}),
    "Relu6": ("Clip", {}, {"low": 0.0, "high": 6.0}),
    "Sigmoid": ("Sigmoid", {}, {}),
    "HardSwish": ("HardSwish", {}, {}),
    "HardSigmoid": ("HardSigmoid", {}, {}),
    "HardSigmoid-mobile": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, {}),
    "Identity": ("Identity", {}, {}),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(5, 3, 3), (7,), (130,)])
def test_activations(name: str, shape: tuple[int, ...]) -> None:
    op, attributes, bounds = ACTIVATIONS[name]
    constants = {key: np.array(value, np.float32) for key, value in bounds.items() if key}
    check_gradients([node(op, ["a", *bounds], **attributes)], shape, {}, constants)


# -- pooling ----------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None, derandomize=True)
@given(shape=IMAGE, data=st.data())
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_pooling(op: str, shape: tuple[int, ...], data: st.DataObject) -> None:
    kernel = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    strides = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    pads = [data.draw(st.integers(0, k - 1)) for k in (*kernel, *kernel)]
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": strides, "pads": pads}
    if op == "MaxPool":
        attributes["dilations"] = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    else:
        attributes["count_include_pad"] = data.draw(st.integers(0, 1))
    reach = [d * (k - 1) + 1 for d, k in zip(attributes.get("dilations", (1, 1)), kernel, strict=True)]
    assume(all(n + pads[i] + pads[i + 2] >= reach[i] for i, n in enumerate(shape[1:])))
    check_gradients([node(op, ["a"], **attributes)], shape)


@pytest.mark.parametrize("shape", [(2, 5, 1), (2, 1, 5), (2, 4, 4)])
@pytest.mark.parametrize("kernel", [(2, 1), (1, 2), (3, 1), (1, 1)])
def test_max_pooling_of_one_row_or_column(shape: tuple[int, ...], kernel: tuple[int, int]) -> None:
    if all(n >= k for n, k in zip(shape[1:], kernel, strict=True)):
        check_gradients([node("MaxPool", ["a"], kernel_shape=kernel)], shape)


@FEW
@given(shape=IMAGE)
def test_global_average_pool(shape: tuple[int, ...]) -> None:
    check_gradients([node("GlobalAveragePool", ["a"])], shape)


@FEW
@given(shape=IMAGE, axes=st.sets(st.sampled_from([1, 2, 3, -1, -2]), min_size=1), keep=st.integers(0, 1))
def test_reduce_mean(shape: tuple[int, ...], axes: set[int], keep: int) -> None:
    assume(len({axis % 4 for axis in axes}) == len(axes))
    reduce = node("ReduceMean", ["a", "axes"], keepdims=keep)
    check_gradients([reduce], shape, {}, {"axes": vector(*sorted(axes))})


# -- moving elements --------------------------------------------------------------------------------------------------

MOVES: dict[str, tuple[list[onnx.NodeProto], dict[str, Array]]] = {
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
    "Concat": ([node("Concat", ["a", "fixed", "a"], axis=2)], {}),
    "Concat-last": ([node("Mul", ["a", "a"], "m"), node("Concat", ["m", "a"], axis=-1)], {}),
    "Pad": ([node("Pad", ["a", "pads"])], {"pads": vector(0, 0, 2, 1, 0, 1, 0, 3)}),
    "Pad-value": (
        [node("Pad", ["a", "pads", "value"])],
        {"pads": vector(0, 1, 0, 0, 0, 0, 1, 0), "value": np.array(2.5, np.float32)},
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_moving_elements(name: str) -> None:
    nodes, constants = MOVES[name]
    if name == "Concat":
        nodes = [node("Mul", ["a", "zero"], "fixed"), *nodes]
        constants = {"zero": np.array(0.0, np.float32)}
    check_gradients(nodes, (2, 3, 4), {}, constants)


# -- fan-out and unknown operators ------------------------------------------------------------------------------------


def test_gradients_are_added_where_a_tensor_fans_out() -> None:
    nodes = [
        node("Sigmoid", ["a"], "s"),
        node("Relu", ["a"], "r"),
        node("Mul", ["s", "r"], "m"),
        node("Add", ["m", "a"], "n"),
        node("Conv", ["n", "w"], "c"),
        node("Conv", ["n", "w"], "d", pads=[1, 0, 1, 0]),
        node("Flatten", ["c"], "f"),
        node("Flatten", ["d"], "g"),
        node("Concat", ["f", "g"], axis=1),
    ]
    check_gradients(nodes, (2, 3, 3), {"w": normal((2, 2, 3, 1))})  # the weight is shared, too


def test_a_branch_that_nobody_reads_is_no_obstacle() -> None:
    check_gradients([node("Sigmoid", ["a"], "unused"), node("Relu", ["a"])], (4,))


@pytest.mark.parametrize("op", ["Erf", "Gelu", "LSTM"])
def test_an_unknown_operator_is_named_with_the_known_ones(op: str) -> None:
    graph = forward_graph([node("Add", ["x", "p"], "h"), node("Relu", ["h"], "z")], (3,), {"p": normal((3,))}, {})
    graph.nodes[1] = Node(op, "odd", ("h",), ("z",), {})
    with pytest.raises(UnsupportedOperatorError) as caught:
        emit_gradients(GraphBuilder(), FunctionLibrary(), graph, {}, ["p"], "targets", loss_from(LossConfig()))
    message = str(caught.value)
    assert op in message and "odd" in message
    assert all(known in message for known in RULES)


def test_an_unknown_operator_before_the_trained_layers_is_no_obstacle() -> None:
    nodes = [node("Erf", ["x"], "h"), node("Add", ["h", "p"], "z")]
    graph = forward_graph(nodes, (3,), {"p": normal((3,))}, {})
    made = emit_gradients(GraphBuilder(), FunctionLibrary(), graph, {}, ["p"], "targets", loss_from(LossConfig()))
    assert set(made.parameters) == {"p"}


def test_a_parameter_without_a_path_to_the_loss_is_an_error() -> None:
    graph = forward_graph(
        [node("Add", ["x", "p"], "z"), node("Sigmoid", ["q"], "r")], (3,), {"p": normal((3,)), "q": normal((3,))}, {}
    )
    layers = {"z": TrainedLayer("z", Dense())}
    with pytest.raises(ExportError, match="no gradient reaches it"):
        emit_gradients(GraphBuilder(), FunctionLibrary(), graph, layers, ["p", "q"], "targets", loss_from(LossConfig()))


# -- the checker itself -----------------------------------------------------------------------------------------------


def _passed_on(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    return dict.fromkeys(sorted(wrt), dy)


def _doubled(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    right = RULES_AS_THEY_ARE[node.op].backward(ctx, node, wrt, dy)
    return {i: ctx.g.op("Mul", d, ctx.g.const(1.01), hint="wrong") for i, d in right.items()}


RULES_AS_THEY_ARE = dict(RULES)
WRONG: dict[str, tuple[str, Any, list[onnx.NodeProto]]] = {
    "relu-passes-everything": ("Relu", _passed_on, [node("Relu", ["a"])]),
    "sigmoid-passes-everything": ("Sigmoid", _passed_on, [node("Sigmoid", ["a"])]),
    "sub-forgets-the-sign": ("Sub", _passed_on, [node("Mul", ["a", "a"], "m"), node("Sub", ["a", "m"])]),
    "one-percent-too-much": ("MaxPool", _doubled, [node("MaxPool", ["a"], kernel_shape=[2, 2])]),
    "conv-one-percent-too-much": ("Conv", _doubled, [node("Conv", ["a", "w"])]),
    "average-one-percent-too-much": ("AveragePool", _doubled, [node("AveragePool", ["a"], kernel_shape=[2, 2])]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, backward, nodes = WRONG[name]
    parameters = {"w": normal((2, 2, 2, 2))} if op == "Conv" else {}
    check_gradients(nodes, (2, 4, 4), parameters)
    right = RULES[op]
    wants = right.wants if backward is _doubled else nothing
    monkeypatch.setitem(RULES, op, Rule(wants, backward, forward=right.forward))
    with pytest.raises(AssertionError, match="not"):
        check_gradients(nodes, (2, 4, 4), parameters)


# Linear is no operator of ONNX, so its evaluator has none; tests/autodiff/test_weight_layers.py holds it to torch.
CHECKED_ELSEWHERE = {"Linear"}


def test_every_rule_is_checked_here() -> None:
    source = __import__("pathlib").Path(__file__).read_text("utf-8")
    assert [op for op in RULES if f'"{op}"' not in source and op not in CHECKED_ELSEWHERE] == []
