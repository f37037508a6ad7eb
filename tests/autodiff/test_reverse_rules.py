"""Every reverse rule against finite differences; shapes are drawn, so that no size is special."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
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
from edgetune.autodiff.memory import TrainedLayer
from edgetune.autodiff.reverse import emit_gradients
from edgetune.autodiff.rule import Context, Rule, nothing
from edgetune.autodiff.rules import RULES
from edgetune.bundle import Array
from edgetune.codecs import Dense
from edgetune.errors import ExportError, UnsupportedOperatorError
from tests.autodiff.checker import check_gradients, forward_graph, node, normal, vector

FEW = settings(max_examples=8, deadline=None, derandomize=True)
EXTENT = st.integers(1, 5)


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


@pytest.mark.parametrize("op", ["Affine", "Einsum", "LSTM"])
def test_an_unknown_operator_is_named_with_the_known_ones(op: str) -> None:
    graph = forward_graph([node("Add", ["x", "p"], "h"), node("Relu", ["h"], "z")], (3,), {"p": normal((3,))}, {})
    graph.nodes[1] = Node(op, "odd", ("h",), ("z",), {})
    with pytest.raises(UnsupportedOperatorError) as caught:
        emit_gradients(GraphBuilder(), FunctionLibrary(), graph, {}, ["p"], "targets", loss_from(LossConfig()))
    message = str(caught.value)
    assert op in message and "odd" in message
    assert all(known in message for known in RULES)


def test_an_unknown_operator_before_the_trained_layers_is_no_obstacle() -> None:
    nodes = [node("Acosh", ["x"], "h"), node("Add", ["h", "p"], "z")]
    graph = forward_graph(nodes, (3,), {"p": normal((3,))}, {})
    made = emit_gradients(GraphBuilder(), FunctionLibrary(), graph, {}, ["p"], "targets", loss_from(LossConfig()))
    assert set(made.parameters) == {"p"}


def test_a_parameter_without_a_path_to_the_loss_is_an_error() -> None:
    graph = forward_graph(
        [node("Add", ["x", "p"], "z"), node("Sigmoid", ["q"], "r")], (3,), {"p": normal((3,)), "q": normal((3,))}, {}
    )
    layers = {"z": TrainedLayer("z", (Dense(),))}
    with pytest.raises(ExportError, match="no gradient reaches it"):
        emit_gradients(GraphBuilder(), FunctionLibrary(), graph, layers, ["p", "q"], "targets", loss_from(LossConfig()))


# -- the checker itself -----------------------------------------------------------------------------------------------


def _passed_on(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    return dict.fromkeys(sorted(wrt), dy)


def _doubled(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    right = RULES_AS_THEY_ARE[node.op]
    made = (
        right.backward_of_many(ctx, node, wrt, [dy]) if right.backward_of_many else right.backward(ctx, node, wrt, dy)
    )
    return {i: ctx.g.op("Mul", d, ctx.g.const(1.01), hint="wrong") for i, d in made.items()}


RULES_AS_THEY_ARE = dict(RULES)
NORM = {"s": np.array([0.7, -1.2], np.float32), "b": np.array([0.1, 0.2], np.float32)}
STATISTICS = {"m": np.zeros(2, np.float32), "v": np.ones(2, np.float32)}
BEST = node("ArgMax", ["x"], "best", axis=1, keepdims=0)
# A wrong rule of every family: its operator, the rule, nodes from a [b, 2, 4, 4] to y, and their constants.
WRONG: dict[str, tuple[str, Any, list[onnx.NodeProto], dict[str, Array]]] = {
    "relu-passes-everything": ("Relu", _passed_on, [node("Relu", ["a"])], {}),
    "leaky-relu-passes-everything": ("LeakyRelu", _passed_on, [node("LeakyRelu", ["a"], alpha=0.5)], {}),
    "sigmoid-passes-everything": ("Sigmoid", _passed_on, [node("Sigmoid", ["a"])], {}),
    "erf-one-percent-too-much": ("Erf", _doubled, [node("Erf", ["a"])], {}),
    "sub-forgets-the-sign": ("Sub", _passed_on, [node("Mul", ["a", "a"], "m"), node("Sub", ["a", "m"])], {}),
    "where-passes-everything": (
        "Where", _passed_on, [node("Greater", ["x", "s0"], "c"), node("Where", ["c", "a", "s0"])],
        {"s0": np.array(0.0, np.float32)},
    ),
    "matmul-one-percent-too-much": ("MatMul", _doubled, [node("MatMul", ["a", "a"])], {}),
    "one-percent-too-much": ("MaxPool", _doubled, [node("MaxPool", ["a"], kernel_shape=[2, 2])], {}),
    "conv-one-percent-too-much": ("Conv", _doubled, [node("Conv", ["a", "w"])], {}),
    "average-one-percent-too-much": ("AveragePool", _doubled, [node("AveragePool", ["a"], kernel_shape=[2, 2])], {}),
    "maximum-one-percent-too-much": ("ReduceMax", _doubled, [node("ReduceMax", ["a", "axes"])], {"axes": vector(2)}),
    "mean-over-the-batch-is-a-sum": ("ReduceMean", RULES["ReduceSum"].backward, [node("ReduceMean", ["a"])], {}),
    "instance-norm-is-constant": ("InstanceNormalization", _passed_on,
        [node("InstanceNormalization", ["a", "s", "b"])], NORM),
    "layer-norm-one-percent-too-much": (
        "LayerNormalization", _doubled, [node("LayerNormalization", ["a", "s4"])], {"s4": normal((4,))},
    ),
    "batch-norm-ignores-its-statistics": (
        "BatchNormalization", _passed_on,
        [helper.make_node("BatchNormalization", ["a", "s", "b", "m", "v"], ["y", "", ""], training_mode=1)],
        {**NORM, **STATISTICS},
    ),
    "softmax-is-log-softmax": ("Softmax", RULES["LogSoftmax"].backward, [node("Softmax", ["a"])], {}),
    "slice-one-percent-too-much": (
        "Slice", _doubled, [node("Slice", ["a", "from", "to", "axes", "from"])],
        {"from": vector(1), "to": vector(9), "axes": vector(2)},
    ),
    "gather-one-percent-too-much": ("Gather", _doubled, [node("Gather", ["a", "i"], axis=2)], {"i": vector(0, 3, 0)}),
    "split-one-percent-too-much": ("Split", _doubled, [node("Split", ["a", "p"], axis=2)], {"p": vector(4)}),
    "upsampling-one-percent-too-much": (
        "Resize", _doubled, [node("Resize", ["a", "", "f"], mode="linear")], {"f": np.array([1, 1, 2, 2], np.float32)},
    ),
    "loss-one-percent-too-much": (
        "SoftmaxCrossEntropyLoss", _doubled, [BEST, node("SoftmaxCrossEntropyLoss", ["a", "best"])], {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, backward, nodes, constants = WRONG[name]
    parameters = {"w": normal((2, 2, 2, 2))} if op == "Conv" else {}
    check_gradients(nodes, (2, 4, 4), parameters, constants)
    right = RULES[op]
    wants = nothing if backward is _passed_on else right.wants
    monkeypatch.setitem(RULES, op, Rule(wants, backward, forward=right.forward))
    with pytest.raises(AssertionError, match="not"):
        check_gradients(nodes, (2, 4, 4), parameters, constants)


# Linear is no operator of ONNX, so its evaluator has none; tests/autodiff/test_weight_layers.py holds it to torch.
CHECKED_ELSEWHERE = {"Linear"}


def test_every_rule_is_checked_here() -> None:
    source = "".join(path.read_text("utf-8") for path in Path(__file__).parent.glob("test_reverse_rules*.py"))
    assert [op for op in RULES if f'"{op}"' not in source and op not in CHECKED_ELSEWHERE] == []
