"""The arithmetic of slices against plain loops over slices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgetune.adapters import Slicing, cut_apart, expand
from edgetune.bundle import Array

# Whole slices; fractional ones along every axis; a kernel that two slices span; one dimension; three.
SHAPES = [
    ((8, 12, 3, 3), (4, 4, 3, 3)),
    ((10, 7, 3, 3), (4, 4, 3, 3)),
    ((3, 2, 1, 1), (4, 4, 3, 3)),
    ((6, 5, 5, 7), (4, 2, 3, 3)),
    ((5, 6, 4), (2, 4, 3)),
    ((4, 3, 2, 3, 2), (3, 2, 2, 2, 2)),
]


def by_loops(codes: Array, shared_map: Array, shape: tuple[int, ...], part: tuple[int, ...]) -> Array:
    result = np.zeros(shape, codes.dtype)
    counts = [-(-extent // size) for extent, size in zip(shape, part, strict=True)]
    for number, place in enumerate(itertools.product(*map(range, counts))):
        piece = (shared_map.T @ codes[number]).reshape(part)
        for inner in itertools.product(*map(range, part)):
            where = tuple(p * size + i for p, size, i in zip(place, part, inner, strict=True))
            if all(index < extent for index, extent in zip(where, shape, strict=True)):
                result[where] = piece[inner]
    return result


@pytest.mark.parametrize(("shape", "part"), SHAPES)
def test_slices_are_put_side_by_side_and_cut(shape: tuple[int, ...], part: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    cut = Slicing(shape, part)
    codes, shared_map = rng.standard_normal((cut.slices, 5)), rng.standard_normal((5, int(np.prod(part))))
    np.testing.assert_allclose(expand(codes, shared_map, shape, part), by_loops(codes, shared_map, shape, part))


@pytest.mark.parametrize(("shape", "part"), SHAPES)
def test_the_gradients_are_those_of_finite_differences(shape: tuple[int, ...], part: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    cut = Slicing(shape, part)
    codes, shared_map = rng.standard_normal((cut.slices, 2)), rng.standard_normal((2, int(np.prod(part))))
    d_filters = rng.standard_normal(shape)
    rows = cut_apart(d_filters, part)
    step_codes, step_map = rng.standard_normal(codes.shape), rng.standard_normal(shared_map.shape)
    h = 1e-6

    def loss(sign: float) -> float:
        moved = expand(codes + sign * h * step_codes, shared_map + sign * h * step_map, shape, part)
        return float(np.sum(moved * d_filters))

    expected = np.sum(step_codes * (rows @ shared_map.T)) + np.sum(step_map * (codes.T @ rows))
    assert (loss(1) - loss(-1)) / (2 * h) == pytest.approx(expected, rel=1e-6)


def test_a_slice_that_is_all_of_the_filters_is_its_own_map() -> None:
    shape = (4, 3, 3, 3)
    codes, shared_map = np.ones((1, 1)), np.arange(108.0)[None]
    assert np.array_equal(expand(codes, shared_map, shape, shape), np.arange(108.0).reshape(shape))


def test_codes_shrink_filters_eighteen_times_and_depthwise_ones_not_at_all() -> None:
    assert Slicing((512, 512, 3, 3), (16, 16, 3, 3)).slices * 128 * 18 == 512 * 512 * 9
    assert Slicing((64, 4, 3, 3), (16, 16, 3, 3)).shrinks(128)  # grouped, four channels each
    assert not Slicing((64, 1, 3, 3), (16, 16, 3, 3)).shrinks(144)  # depthwise
