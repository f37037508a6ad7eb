"""Rules of reductions, normalisations and losses against finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from edgetune.bundle import Array
from tests.autodiff.checker import check_gradients, forward_outputs, node, normal, vector

FEW = settings(max_examples=5, deadline=None, derandomize=True)
EXTENT = st.integers(1, 4)
IMAGE = st.tuples(st.integers(1, 3), st.integers(2, 4), st.integers(2, 4))


def number(value: float) -> Array:
    return np.array(value, np.float32)


# -- reductions -------------------------------------------------------------------------------------------------------

SIGNED = ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare")
REDUCTIONS = (*SIGNED, "ReduceLogSumExp", "ReduceLogSum")


def before(op: str) -> tuple[list[Any], str]:
    """Return nodes that make the operand, positive where it must be."""
    return ([node("Exp", ["a"], "e")], "e") if op == "ReduceLogSum" else ([], "a")


@FEW
@given(shape=IMAGE, axes=st.sets(st.sampled_from([0, 1, 2, 3, -1, -2, -4]), min_size=1), keep=st.integers(0, 1))
@pytest.mark.parametrize("op", REDUCTIONS)
def test_reductions(op: str, shape: tuple[int, ...], axes: set[int], keep: int) -> None:
    assume(len({axis % 4 for axis in axes}) == len(axes))
    nodes, operand = before(op)
    nodes.append(node(op, [operand, "axes"], "y" if 0 not in axes and -4 not in axes else "r", keepdims=keep))
    if nodes[-1].output[0] == "r":
        nodes.append(node("Mul", ["r", "r"]))
    check_gradients(nodes, shape, {}, {"axes": vector(*sorted(axes))}, scale=0.3)


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize("keep", [0, 1])
def test_reductions_of_everything(op: str, keep: int) -> None:
    nodes, operand = before(op)
    check_gradients([*nodes, node(op, [operand], keepdims=keep)], (3, 2), scale=0.3)


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean"])
def test_a_reduction_over_no_axes(op: str) -> None:
    check_gradients([node(op, ["a"], noop_with_empty_axes=1)], (3, 2))


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean", "ReduceMax"])
def test_reductions_of_a_batch_behind_other_axes(op: str) -> None:
    moved = node("Transpose", ["a"], "t", perm=[1, 0, 2])
    check_gradients([moved, node(op, ["t", "axes"], keepdims=0)], (3, 2), {}, {"axes": vector(1)})
    folded = node("Reshape", ["a", "rows"], "t")
    check_gradients(
        [folded, node(op, ["t", "axes"], keepdims=0)], (3, 2), {}, {"axes": vector(0), "rows": vector(-1, 2)}
    )


@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin"])
def test_equal_extremes_share_the_gradient(op: str) -> None:
    # a repeated thrice: the extreme is a, with slope 1
    check_gradients([node("Tile", ["a", "thrice"], "t"), node(op, ["t", "axes"])], (1, 4), {}, {
        "thrice": vector(1, 3, 1), "axes": vector(1),
    })  # fmt: skip


def test_the_norm_of_zeros_has_the_gradient_zero() -> None:
    nodes = [node("Sub", ["a", "a"], "zeros"), node("ReduceL2", ["zeros", "axes"], "n"), node("Add", ["a", "n"])]
    check_gradients(nodes, (3, 2), {}, {"axes": vector(1)})


# -- normalisations ---------------------------------------------------------------------------------------------------


@FEW
@given(shape=st.tuples(EXTENT, EXTENT, st.integers(2, 5)), axis=st.sampled_from([-1, 2, -2, 1]), bias=st.booleans())
@pytest.mark.parametrize("trained", [True, False])
def test_layer_normalization(trained: bool, shape: tuple[int, ...], axis: int, bias: bool) -> None:
    tail = (1, *shape)[axis:]
    values = {"scale": normal(tail), **({"bias": normal(tail, 2)} if bias else {})}
    layer = node("LayerNormalization", ["a", *values], axis=axis, epsilon=1e-3)
    check_gradients([layer], shape, values if trained else {}, {} if trained else values)


def test_layer_normalization_with_one_scale_for_all() -> None:
    check_gradients([node("LayerNormalization", ["a", "scale"])], (3, 4), {"scale": normal((1,))})


@FEW
@given(shape=st.one_of(IMAGE, st.tuples(EXTENT, st.integers(2, 5))))
@pytest.mark.parametrize("trained", [True, False])
def test_instance_normalization(trained: bool, shape: tuple[int, ...]) -> None:
    values = {"scale": normal(shape[:1]), "bias": normal(shape[:1], 2)}
    layer = node("InstanceNormalization", ["a", "scale", "bias"], epsilon=1e-3)
    check_gradients([layer], shape, values if trained else {}, {} if trained else values)


@FEW
@given(
    groups=st.integers(1, 3), per_group=st.integers(1, 2), positions=st.lists(st.integers(2, 3), min_size=1, max_size=3)
)
def test_group_normalization(groups: int, per_group: int, positions: list[int]) -> None:
    parameters = {"scale": normal((groups,)), "bias": normal((groups,), 2)}
    layer = node("GroupNormalization", ["a", "scale", "bias"], num_groups=groups, epsilon=1e-3)
    check_gradients([layer], (groups * per_group, *positions), parameters)


@FEW
@given(shape=st.one_of(IMAGE, st.tuples(st.integers(1, 4)), st.tuples(EXTENT, st.integers(2, 5))))
@pytest.mark.parametrize("trained", [True, False])
def test_batch_normalization(trained: bool, shape: tuple[int, ...]) -> None:
    channels = shape[:1]
    parameters = {"gamma": normal(channels), "beta": normal(channels, 2)}
    fixed = {"mean": normal(channels, 3), "var": np.abs(normal(channels, 4)) + np.float32(0.5)}
    layer = node("BatchNormalization", ["a", "gamma", "beta", "mean", "var"], epsilon=1e-2)
    check_gradients([layer], shape, parameters if trained else {}, fixed if trained else {**fixed, **parameters})


@FEW
@given(shape=st.one_of(IMAGE, st.tuples(st.integers(1, 4)), st.tuples(EXTENT, st.integers(2, 5))))
def test_batch_normalization_with_the_statistics_of_the_batch(shape: tuple[int, ...]) -> None:
    channels = shape[:1]
    parameters = {"gamma": normal(channels), "beta": normal(channels, 2)}
    fixed = {"mean": normal(channels, 3), "var": np.abs(normal(channels, 4)) + np.float32(0.5)}
    layer = node("BatchNormalization", ["a", "gamma", "beta", "mean", "var"], epsilon=1e-1, training_mode=1)
    layer.output.extend(["new_mean", "new_var"])
    check_gradients([layer], shape, parameters, fixed)


@pytest.mark.parametrize("shape", [(3, 4, 2), (3,)])
def test_running_statistics_are_those_of_torch(shape: tuple[int, ...]) -> None:
    fixed = {"gamma": normal((3,)), "beta": normal((3,), 2), "mean": normal((3,), 3), "var": np.abs(normal((3,), 4))}
    layer = node("BatchNormalization", ["a", *fixed], epsilon=1e-5, momentum=0.7, training_mode=1)
    layer.output.extend(["new_mean", "new_var"])
    x = normal((4, *shape), 5)
    mean, var = forward_outputs([node("Identity", ["x"], "a"), layer], x, fixed, ["new_mean", "new_var"])
    over = tuple(i for i in range(x.ndim) if i != 1)
    np.testing.assert_allclose(mean, 0.7 * fixed["mean"] + 0.3 * x.mean(over), rtol=1e-5)
    np.testing.assert_allclose(var, 0.7 * fixed["var"] + 0.3 * x.var(over, ddof=1), rtol=1e-5)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("axis", [-1, 1])
def test_lp_normalization(p: int, axis: int) -> None:
    check_gradients([node("LpNormalization", ["a"], p=p, axis=axis)], (3, 4))


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_softmax(op: str, axis: int) -> None:
    check_gradients([node(op, ["a"], axis=axis)], (3, 4))


# -- losses -----------------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    positions=st.lists(st.integers(1, 3), max_size=2), reduction=st.sampled_from(["mean", "sum", "none"]),
    weighted=st.booleans(), ignored=st.sampled_from([None, 1, -100]),
)  # fmt: skip
@pytest.mark.parametrize("op", ["NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"])
def test_losses(op: str, positions: list[int], reduction: str, weighted: bool, ignored: int | None) -> None:
    classes = 3
    constants: dict[str, Array] = {"weights": np.array([0.5, 2.0, 1.5], np.float32)} if weighted else {}
    attributes: dict[str, Any] = {"reduction": reduction, **({} if ignored is None else {"ignore_index": ignored})}
    target = [node("ArgMax", ["x"], "target", axis=1, keepdims=0)]
    if ignored == -100:
        constants |= {"zero": number(0.0), "bad": np.array(-100, np.int64)}
        target = [
            node("ArgMax", ["x"], "best", axis=1, keepdims=0), node("ReduceMax", ["x", "one"], "top", keepdims=0),
            node("Greater", ["top", "zero"], "sure"), node("Where", ["sure", "best", "bad"], "target"),
        ]  # fmt: skip
        constants["one"] = vector(1)
    loss = node(op, ["a", "target", *(["weights"] if weighted else [])], **attributes)
    try:
        check_gradients([*target, loss], (classes, *positions), {}, constants)
    except ZeroDivisionError:  # every target ignored
        assume(False)


def test_a_loss_with_its_log_probabilities() -> None:
    target = node("ArgMax", ["x"], "target", axis=1, keepdims=0)
    loss = node("SoftmaxCrossEntropyLoss", ["a", "target"], "loss")
    loss.output.append("log_p")
    check_gradients([target, loss, node("Add", ["log_p", "loss"])], (4, 3))
    loss = node("SoftmaxCrossEntropyLoss", ["a", "target"], "loss")
    loss.output.append("y")
    check_gradients([target, loss], (4, 3))


def test_targets_of_32_bits() -> None:
    nodes = [node("ArgMax", ["x"], "best", axis=1, keepdims=0), node("Cast", ["best"], "t", to=TensorProto.INT32)]
    check_gradients([*nodes, node("SoftmaxCrossEntropyLoss", ["a", "t"], ignore_index=0)], (4, 3))
