"""Sizes of symbolic shapes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.errors import BundleError
from edgetune.planning.sizes import elements, evaluate, nbytes, rank_symbol
from tests.planning.synthetic import use

SYMBOLS = {"batch": 4, "rank.layer4.1.conv1.c": 3, "rank./block/conv.h": 5}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7),
        ("batch", 4),
        ("2*batch*rank.layer4.1.conv1.c", 24),
        (" 2 * 3 ", 6),
        ("0*batch", 0),
        ("rank./block/conv.h*rank./block/conv.h", 25),
    ],
)
def test_an_expression_is_a_product(expression: str, value: int) -> None:
    assert evaluate(expression, SYMBOLS) == value


@pytest.mark.parametrize("expression", ["", "2*", "*batch", "2**3"])
def test_what_is_no_product_is_refused(expression: str) -> None:
    with pytest.raises(BundleError, match="joined by"):
        evaluate(expression, SYMBOLS)


@pytest.mark.parametrize("expression", ["bacth", "batch+1", "-1", "__import__('os')", "batch batch", "1.5"])
def test_an_unknown_symbol_is_named_with_the_known_ones(expression: str) -> None:
    with pytest.raises(BundleError) as caught:
        evaluate(expression, SYMBOLS)
    assert f"'{expression}'" in str(caught.value)
    assert "batch, rank./block/conv.h, rank.layer4.1.conv1.c" in str(caught.value)


@given(st.lists(st.lists(st.sampled_from(["batch", "r.x", "2", "7", "0"]), min_size=1, max_size=4), max_size=5))
def test_elements_are_the_product_over_axes(axes: list[list[str]]) -> None:
    symbols = {"batch": 3, "r.x": 11}
    expected = 1
    for axis in axes:
        for factor in axis:
            expected *= symbols[factor] if factor in symbols else int(factor)
    assert elements(tuple("*".join(axis) for axis in axes), symbols) == expected


def test_bytes_follow_the_element_type() -> None:
    sizes = {d: nbytes(use("t", "batch 5", "saved", 0, 1, dtype=d), SYMBOLS) for d in ("uint8", "float16", "int64")}
    assert sizes == {"uint8": 20, "float16": 40, "int64": 160}
    with pytest.raises(BundleError, match="float23"):
        nbytes(use("t", "1", "saved", 0, 1, dtype="float23"), SYMBOLS)


def test_a_scalar_has_one_element() -> None:
    assert elements((), {}) == 1


def test_rank_symbol() -> None:
    assert rank_symbol("layer4.1.conv1", "c") == "rank.layer4.1.conv1.c"
