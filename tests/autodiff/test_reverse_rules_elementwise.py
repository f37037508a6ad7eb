"""Rules of activations, arithmetic and matrix products against finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from edgetune.autodiff.rules.arithmetic import WITHOUT_GRADIENT
from edgetune.bundle import Array
from tests.autodiff.checker import check_gradients, node, normal, vector

FEW = settings(max_examples=6, deadline=None, derandomize=True)
EXTENT = st.integers(1, 4)


def number(value: float) -> Array:
    return np.array(value, np.float32)


# -- activations ------------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {
    "Relu": ("Relu", {}, {}),
    "Clip": ("Clip", {}, {"low": -0.5, "high": 0.9}),
    "Clip-low": ("Clip", {}, {"low": 0.2}),
    "Clip-high": ("Clip", {}, {"": 0.0, "high": 0.2}),
    "Clip-none": ("Clip", {}, {}),
    "Relu6": ("Clip", {}, {"low": 0.0, "high": 6.0}),
    "Sigmoid": ("Sigmoid", {}, {}),
    "Tanh": ("Tanh", {}, {}),
    "Erf": ("Erf", {}, {}),
    "HardSwish": ("HardSwish", {}, {}),
    "HardSigmoid": ("HardSigmoid", {}, {}),
    "HardSigmoid-mobile": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, {}),
    "LeakyRelu": ("LeakyRelu", {}, {}),
    "LeakyRelu-negative": ("LeakyRelu", {"alpha": -0.3}, {}),
    "Elu": ("Elu", {"alpha": 1.7}, {}),
    "Selu": ("Selu", {}, {}),
    "Selu-own": ("Selu", {"alpha": 0.7, "gamma": 1.3}, {}),
    "Celu": ("Celu", {"alpha": 0.6}, {}),
    "Softplus": ("Softplus", {}, {}),
    "Softsign": ("Softsign", {}, {}),
    "ThresholdedRelu": ("ThresholdedRelu", {"alpha": 0.4}, {}),
    "Shrink": ("Shrink", {"lambd": 0.3, "bias": 0.1}, {}),
    "Mish": ("Mish", {}, {}),
    "Gelu": ("Gelu", {"approximate": "none"}, {}),
    "Gelu-tanh": ("Gelu", {"approximate": "tanh"}, {}),
    "Swish": ("Swish", {"alpha": 1.0}, {}),
    "Swish-steep": ("Swish", {"alpha": 1.702}, {}),
    "Identity": ("Identity", {}, {}),
    "Neg": ("Neg", {}, {}),
    "Abs": ("Abs", {}, {}),
    "Exp": ("Exp", {}, {}),
    "Sin": ("Sin", {}, {}),
    "Cos": ("Cos", {}, {}),
    "Atan": ("Atan", {}, {}),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(5, 3, 3), (130,)])
def test_activations(name: str, shape: tuple[int, ...]) -> None:
    op, attributes, bounds = ACTIVATIONS[name]
    constants = {key: number(value) for key, value in bounds.items() if key}
    check_gradients([node(op, ["a", *bounds], **attributes)], shape, {}, constants, scale=0.2 if op == "Exp" else 1.0)


@FEW
@given(shape=st.lists(EXTENT, min_size=1, max_size=3), scale=st.sampled_from([0.05, 1.0, 4.0]))
@pytest.mark.parametrize("name", ["Gelu", "Gelu-tanh", "Swish", "Swish-steep"])
def test_activations_that_are_written_out(name: str, shape: list[int], scale: float) -> None:
    op, attributes, _ = ACTIVATIONS[name]
    check_gradients([node(op, ["a"], **attributes)], shape, scale=scale)


@pytest.mark.parametrize("op", ["Sqrt", "Reciprocal", "Log"])
def test_functions_of_positive_numbers(op: str) -> None:
    nodes = [node("Abs", ["a"], "size"), node("Add", ["size", "half"], "positive"), node(op, ["positive"])]
    check_gradients(nodes, (3, 4), {}, {"half": number(0.5)})


@pytest.mark.parametrize("slope", [(5, 1, 1), (1,), (5, 3, 2)])
@pytest.mark.parametrize("trained", [True, False])
def test_prelu(slope: tuple[int, ...], trained: bool) -> None:
    parameters, constants = ({"slope": normal(slope)}, {}) if trained else ({}, {"slope": normal(slope)})
    check_gradients([node("PRelu", ["a", "slope"])], (5, 3, 2), parameters, constants)


# -- arithmetic -------------------------------------------------------------------------------------------------------


@FEW
@given(
    op=st.sampled_from(["Add", "Sub", "Mul", "Div", "Sum", "Mean", "Max", "Min"]),
    shape=st.tuples(EXTENT, EXTENT, EXTENT), data=st.data(),
)  # fmt: skip
@pytest.mark.parametrize("parameter_first", [True, False])
def test_arithmetic_with_broadcasting(
    parameter_first: bool, op: str, shape: tuple[int, ...], data: st.DataObject
) -> None:
    kept = data.draw(st.tuples(*[st.booleans()] * len(shape)))
    lead = data.draw(st.integers(0, len(shape)))
    small = tuple(n if keep else 1 for n, keep in zip(shape, kept, strict=True))[lead:]
    names = ["p", "a"] if parameter_first else ["a", "p"]
    values = normal(small)
    if op == "Div":
        names, values = ["a", "p"], np.sign(values) * (np.abs(values) + np.float32(0.5))
    check_gradients([node(op, names)], shape, {"p": values})


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul"])
def test_arithmetic_of_one_tensor_with_itself_and_of_two_activations(op: str) -> None:
    check_gradients([node("Mul", ["a", "p"], "other"), node(op, ["other", "a"])], (3, 4), {"p": normal((4,))})
    check_gradients([node("Mul", ["a", "p"], "other"), node(op, ["other", "other"])], (3, 4), {"p": normal((4,))})


def test_division_by_an_activation() -> None:
    nodes = [node("Exp", ["a"], "e"), node("Div", ["p", "e"])]
    check_gradients(nodes, (3, 4), {"p": normal((3, 1))}, scale=0.3)


@pytest.mark.parametrize("op", ["Sum", "Mean", "Max", "Min"])
@pytest.mark.parametrize("count", [1, 3])
def test_variadic_operators(op: str, count: int) -> None:
    parameters = {"p": normal((3, 4)), "q": normal((1, 4), 2)} if count == 3 else {}
    check_gradients([node(op, ["a", *parameters])], (3, 4), parameters)


@pytest.mark.parametrize("op", ["Max", "Min"])
def test_a_bound_is_a_bit_per_element(op: str) -> None:
    check_gradients([node(op, ["a", "bound"])], (3, 5), {}, {"bound": number(0.2)})
    check_gradients([node(op, ["bound", "a"])], (3, 5), {}, {"bound": np.array([-0.2], np.float32)})


@pytest.mark.parametrize("op", ["Max", "Min"])
def test_equal_operands_share_the_gradient(op: str) -> None:
    # max(a, a) = a: its slope is 1, whoever is taken to be the larger one
    check_gradients([node("Identity", ["a"], "b"), node(op, ["a", "b"])], (3, 4))


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, 3.0, -1.0, 0.5])
def test_power_with_a_constant_exponent(exponent: float) -> None:
    nodes = [node("Exp", ["a"], "e"), node("Pow", ["e", "exponent"])]
    check_gradients(nodes, (3, 4), {}, {"exponent": number(exponent)}, scale=0.3)


def test_power_with_an_integer_exponent() -> None:
    check_gradients([node("Pow", ["a", "exponent"])], (3, 2), {}, {"exponent": np.array([2, 3], np.int64)}, scale=0.5)


def test_power_with_a_trained_exponent_and_a_parameter_as_base() -> None:
    nodes = [node("Exp", ["a"], "e"), node("Pow", ["e", "p"])]
    check_gradients(nodes, (3, 4), {"p": normal((3, 1))}, scale=0.3)
    nodes = [node("Exp", ["p"], "e"), node("Pow", ["e", "a"])]
    check_gradients(nodes, (3, 4), {"p": normal((4,))}, scale=0.3)


def test_where() -> None:
    nodes = [node("Greater", ["x", "zero"], "c"), node("Mul", ["a", "p"], "b"), node("Where", ["c", "a", "b"])]
    check_gradients(nodes, (3, 4), {"p": normal((4,))}, {"zero": number(0.0)})
    mask = np.array([True, False, True, False])
    check_gradients([node("Where", ["c", "p", "a"])], (3, 4), {"p": normal((1,))}, {"c": mask})


def test_cast_between_floats() -> None:
    nodes = [node("Cast", ["a"], "wide", to=TensorProto.DOUBLE), node("Mul", ["wide", "wide"], "square")]
    check_gradients([*nodes, node("Cast", ["square"], to=TensorProto.FLOAT)], (3, 4))
    check_gradients([*nodes, node("CastLike", ["square", "x"])], (3, 4))


def test_remainder() -> None:
    check_gradients([node("Mod", ["a", "b"], fmod=1)], (3, 4), {}, {"b": number(0.5)})


@pytest.mark.parametrize("op", WITHOUT_GRADIENT)
def test_operators_without_a_gradient_are_no_obstacle(op: str) -> None:
    pairs = ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"]
    logic = ["And", "Or", "Xor", "Not"]
    inputs = ["a", "half"] if op in pairs else ["t", "u"] if op in logic else ["a"]
    inputs = inputs[:1] if op == "Not" else inputs
    nodes = [node("Greater", ["a", "half"], "t"), node("Less", ["a", "quarter"], "u"), node(op, inputs, "step")]
    nodes += [node("Cast", ["step"], "s", to=TensorProto.FLOAT), node("ReduceSum", ["s"], "total", keepdims=0)]
    nodes += [node("Mul", ["a", "total"])]
    check_gradients(nodes, (3, 4), {}, {"half": number(0.5), "quarter": number(-0.25)}, scale=0.3)


def test_the_steps_are_all_named() -> None:
    known = {
        "Floor", "Ceil", "Round", "Sign", "Hardmax", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual",
        "IsNaN", "IsInf", "And", "Or", "Xor", "Not", "ArgMax", "ArgMin", "Shape", "Size",
    }  # fmt: skip
    assert known == set(WITHOUT_GRADIENT)


# -- matrix products --------------------------------------------------------------------------------------------------


@FEW
@given(lead=st.lists(EXTENT, max_size=2), sizes=st.tuples(EXTENT, EXTENT))
def test_matmul_with_a_matrix(lead: list[int], sizes: tuple[int, int]) -> None:
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


@settings(max_examples=12, deadline=None, derandomize=True)
@given(lead=st.tuples(EXTENT, EXTENT), sizes=st.tuples(EXTENT, EXTENT, EXTENT), data=st.data())
def test_matmul_with_broadcasting(lead: tuple[int, int], sizes: tuple[int, int, int], data: st.DataObject) -> None:
    rows, inner, columns = sizes
    kept = [n if data.draw(st.booleans()) else 1 for n in lead]
    small = tuple(kept[data.draw(st.integers(0, 2)) :])
    if data.draw(st.booleans()):
        check_gradients([node("MatMul", ["a", "w"])], (*lead, rows, inner), {"w": normal((*small, inner, columns))})
    else:
        check_gradients([node("MatMul", ["w", "a"])], (*lead, inner, columns), {"w": normal((*small, rows, inner))})


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 3)])
def test_matmul_with_a_column(shape: tuple[int, ...]) -> None:
    check_gradients([node("MatMul", ["a", "w"])], shape, {"w": normal((3,))})


@pytest.mark.parametrize("shape", [(3, 2), (4, 3, 2)])
def test_matmul_with_a_row(shape: tuple[int, ...]) -> None:
    check_gradients([node("MatMul", ["w", "a"])], shape, {"w": normal((3,))})


def test_matmul_of_two_vectors_and_over_the_batch() -> None:
    nodes = [node("Reshape", ["a", "flat"], "f"), node("MatMul", ["f", "f"])]
    check_gradients(nodes, (3,), {}, {"flat": vector(-1)})
    nodes = [node("Transpose", ["a"], "t", perm=[1, 0]), node("MatMul", ["t", "a"])]
    check_gradients(nodes, (3,))
