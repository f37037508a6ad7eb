"""What calibration measures of codecs that keep a count: the energy of the largest coefficients, against a sort."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from edgetune.autodiff.builder import GraphBuilder
from edgetune.autodiff.calibrate import emit_grams
from edgetune.autodiff.graph import ForwardGraph, Node
from edgetune.autodiff.memory import Option, Slot, input_name
from edgetune.codecs import CODECS, Codec, Mode, Saved, Source, Sparse, count_grid, menu_from
from edgetune.codecs.base import Array
from tests.codecs.test_codec_laws import run_graph


def slot_of(menu: Sequence[Codec], saved: Saved) -> Slot:
    options = [Option(c, tuple((mode, input_name(saved.name, mode)) for mode in c.modes(saved))) for c in menu]
    return Slot("y", (saved.name,), saved, tuple(options))


def measured(menu: str, saved: Saved, x: Array) -> dict[str, Array]:
    """Return by spectrum what is measured of y = x, whose shape may be that of ``saved`` or another."""
    nodes = [Node("Identity", "same", ("x",), ("y",), {})]
    shape = (0, *x.shape[1:])
    graph = ForwardGraph(nodes, ("x",), ("y",), {}, {"x": shape, "y": shape})
    g = GraphBuilder(taken={"x", "y"})
    made = emit_grams(g, graph, [slot_of(menu_from(menu), saved)])
    found = run_graph(g, {"x": x}, list(made.values()))
    return {output.removeprefix(f"gram/{saved.name}/"): found[name] for output, name in made.items()}


def held(codec: Codec, saved: Saved, x: Array) -> Array:
    """Return the same by numpy, in float64."""
    assert isinstance(codec, Sparse)
    sizes = np.sort(np.abs(codec.coefficients(x.reshape(-1, *saved.shape), saved)), axis=1)[:, ::-1] ** 2
    counts = [*count_grid(math.prod(saved.shape)), sizes.shape[1]]
    return np.array([[sizes[:, :count].sum() for count in counts]])


@pytest.mark.parametrize("saved", [Saved("l", (3, 14, 13)), Saved("l", (50, 24), channels_last=True)])
def test_each_codec_of_a_menu_has_its_own_row(saved: Saved) -> None:
    x = np.cumsum(np.random.default_rng(1).standard_normal((4, *saved.shape)), axis=1).astype(np.float32)
    found = measured("hosvd+dct+haar+db3+threshold", saved, x)
    assert set(found) == {"b", *saved.extents(), "dct.k", "haar.k", "db3.k", "threshold.k"}
    for name in ("dct", "haar", "db3", "threshold"):
        row = found[f"{name}.k"]
        assert row.dtype == np.float32
        np.testing.assert_allclose(row, held(CODECS[name], saved, x), rtol=1e-5)
        # An orthonormal transform keeps the energy.
        assert row[0, -1] == pytest.approx(np.square(x, dtype=np.float64).sum(), rel=1e-5)


def test_the_row_tells_the_energy_that_a_step_with_this_count_returns() -> None:
    saved = Saved("l", (4, 9, 7))
    x = np.maximum(np.random.default_rng(2).standard_normal((3, *saved.shape)), 0).astype(np.float32)
    codec, row = CODECS["db3"], measured("db3", saved, x)["db3.k"][0]
    for count, energy in zip(count_grid(math.prod(saved.shape)), row[:-1], strict=True):
        g = GraphBuilder(taken={"x", "k"})
        name = codec.emit_encode(g, "x", saved, {"k": "k"}).energy
        assert name is not None
        found = run_graph(g, {"x": x, "k": np.array([count])}, [name])[name]
        assert float(found) == pytest.approx(energy / row[-1], abs=1e-5)


def test_sums_of_many_terms_keep_their_digits() -> None:
    saved = Saved("l", (64, 56, 56))
    x = np.full((2, *saved.shape), 0.1, np.float32)
    np.testing.assert_allclose(
        measured("threshold", saved, x)["threshold.k"], held(CODECS["threshold"], saved, x), rtol=1e-6
    )


def test_a_tensor_of_another_shape_is_read_by_sample() -> None:
    saved = Saved("l", (3, 8, 4), channels_last=True)
    x = np.random.default_rng(0).standard_normal((2, 24, 4)).astype(np.float32)
    np.testing.assert_allclose(measured("haar", saved, x)["haar.k"], held(CODECS["haar"], saved, x), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows_in_the_total(bad: float) -> None:
    saved = Saved("l", (8, 31, 33))
    x = np.random.default_rng(0).standard_normal((2, *saved.shape)).astype(np.float32)
    x[1, 3, 4:9, 5:21] = bad
    assert not math.isfinite(measured("threshold", saved, x)["threshold.k"][0, -1])


def test_a_count_of_no_sparse_codec_is_an_error() -> None:
    class Odd:
        name = "odd"

        def modes(self, saved: Saved) -> tuple[Mode, ...]:
            return (Mode("k", Source.COUNT, 9, spectrum="odd.k"),)

    saved = Saved("l", (9,))
    graph = ForwardGraph([], ("y",), ("y",), {}, {"y": (0, 9)})
    odd: Codec = Odd()  # type: ignore[assignment]
    with pytest.raises(TypeError, match="codec odd"):
        emit_grams(GraphBuilder(taken={"y"}), graph, [slot_of([odd], saved)])
