"""Sparse codecs: the transforms against scipy and PyWavelets, what is kept against a sort, nodes against the oracle."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import pywt
import scipy.fft
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from edgetune.autodiff.builder import GraphBuilder
from edgetune.codecs import CODECS, Saved, Sparse, captured_energy, count_grid, menu_from
from edgetune.codecs.base import Array
from edgetune.codecs.dct import Dct
from edgetune.codecs.sparse import GRID_POINTS, index_bytes, most_useful_count
from edgetune.codecs.wavelet import DB3, Wavelet, level_matrix
from edgetune.engines.torch_ops.program import Program, Setting
from edgetune.errors import DataError
from tests.codecs.test_codec_laws import run_graph

NAMES = ("dct", "haar", "db3", "threshold")
KINDS = ("random", "smooth", "relu", "constant", "zeros", "duplicates", "huge", "tiny")
# Channels first and last; extents that neither 16 nor 8 divides; one that 16 does; one position, a volume, none longer.
LAYOUTS = (
    Saved("l", (3, 7, 13)),
    Saved("l", (2, 56, 7)),
    Saved("l", (4, 16, 16), groups=2),
    Saved("l", (5, 19)),
    Saved("l", (2, 5, 6, 9)),
    Saved("l", (2, 1, 9)),
    Saved("l", (7, 13, 3), channels_last=True),
    Saved("l", (35, 4), channels_last=True),
    Saved("l", (3, 4, 5, 2), channels_last=True),
)


def sparse(name: str) -> Sparse:
    codec = CODECS[name]
    assert isinstance(codec, Sparse)
    return codec


def tensor(kind: str, shape: tuple[int, ...], seed: int = 0) -> Array:
    x = np.random.default_rng(seed).standard_normal(shape)
    if kind == "smooth":
        for axis in range(1, len(shape)):
            x = np.cumsum(x, axis)
    elif kind == "relu":
        x = np.maximum(x, 0)
    elif kind == "constant":
        x = np.full(shape, 1.7)
    elif kind == "zeros":
        x = np.zeros(shape)
    elif kind == "duplicates":
        x[:] = x[:1]
    elif kind in ("huge", "tiny"):
        x *= 1e30 if kind == "huge" else 1e-30
    return x.astype(np.float32)


def count(k: int) -> dict[str, Array]:
    return {"k": np.array([k], np.int64)}


def run_emitted(codec: Sparse, x: Array, saved: Saved, k: int) -> tuple[dict[str, Array], float, Array]:
    """Return what the nodes store, the energy, and what they decode."""
    g = GraphBuilder(taken={"x", "k"})
    encoded = codec.emit_encode(g, "x", saved, {"k": "k"})
    decoded = codec.emit_decode(g, encoded, saved)
    assert encoded.energy is not None
    found = run_graph(g, {"x": x, **count(k)}, [*encoded.stored, encoded.energy, decoded])
    names = [stored.name for stored in codec.stored(saved)]
    stored = {name: found[key] for name, key in zip(names, encoded.stored, strict=True)}
    return stored, float(found[encoded.energy]), found[decoded]


def tensor_of(constant: TensorProto) -> torch.Tensor:
    return torch.from_numpy(np.array(numpy_helper.to_array(constant)))


def distance(a: Array, b: Array) -> float:
    """Return ‖a - b‖ / ‖b‖, or ‖a - b‖ where b is zero."""
    norm = float(np.linalg.norm(b.astype(np.float64)))
    return float(np.linalg.norm(a.astype(np.float64) - b.astype(np.float64))) / (norm or 1.0)


def position_axes(saved: Saved) -> range:
    """Return the axes of the positions in [b, *saved.shape]."""
    return range(1, 1 + len(saved.positions)) if saved.channels_last else range(2, 2 + len(saved.positions))


# The transforms


def dct_by_scipy(x: Array, saved: Saved) -> Array:
    """The transform of every block of 16 along every position axis by itself, in place."""
    found = np.zeros(x.shape)
    for starts in itertools.product(*(range(0, extent, 16) for extent in saved.positions)):
        block = [slice(None)] * x.ndim
        for axis, start in zip(position_axes(saved), starts, strict=True):
            block[axis] = slice(start, start + 16)
        found[tuple(block)] = scipy.fft.dctn(
            x[tuple(block)].astype(np.float64), norm="ortho", axes=list(position_axes(saved))
        )
    return found.reshape(len(x), -1)


def nested(x: Array, wavelet: str, axes: range) -> Array:
    """Three levels of PyWavelets in the nested layout; the last of an odd number of elements goes to the low band."""
    extents = {axis: x.shape[axis] for axis in axes}
    found = x.astype(np.float64)
    for _ in range(3):
        corner = tuple(slice(extents.get(axis)) for axis in range(x.ndim))
        for axis in axes:
            if extents[axis] > 1:
                found[corner] = np.apply_along_axis(one_level, axis, found[corner], wavelet)
        extents = {axis: -(-extent // 2) for axis, extent in extents.items()}
    return found


def one_level(line: Array, wavelet: str) -> Array:
    even = len(line) // 2 * 2
    low, high = pywt.dwt(line[:even], wavelet, mode="periodization")
    return np.concatenate([low, line[even:], high])


def peeled(array: Array, axes: range, levels: int = 3) -> Array:
    """Return the coefficients [b, n] of a nested layout in the order of the codec: high bands first, axis by axis."""
    parts = []
    for _ in range(levels - 1):
        if all(array.shape[axis] == 1 for axis in axes):
            break
        for axis in axes:
            array, high = np.split(array, [-(-array.shape[axis] // 2)], axis)
            parts.append(high)
    return np.concatenate([part.reshape(len(array), -1) for part in (*parts, array)], axis=1)


def assert_equal_to_pywavelets(codec: Sparse, wavelet: str) -> None:
    """Hold ``codec`` to wavedecn where 8 divides all extents."""
    for shape, last in (((3, 24), False), ((2, 16, 8), False), ((2, 8, 16, 8), False), ((56, 8, 2), True)):
        saved = Saved("l", shape, channels_last=last)
        x, axes = tensor("random", (2, *shape)), position_axes(saved)
        parts = pywt.wavedecn(x.astype(np.float64), wavelet, mode="periodization", level=3, axes=tuple(axes))
        array, _ = pywt.coeffs_to_array(parts, axes=tuple(axes))
        assert distance(codec.coefficients(x, saved), peeled(array, axes)) <= 1e-12
        g = GraphBuilder(taken={"x"})
        name = codec.emit_coefficients(g, "x", saved)
        assert distance(run_graph(g, {"x": x}, [name])[name], peeled(array, axes)) <= 1e-6


@pytest.mark.filterwarnings("ignore:Level value of 3 is too high")
@pytest.mark.parametrize("name", ["haar", "db3"])
def test_wavelets_equal_pywavelets(name: str) -> None:
    assert_equal_to_pywavelets(sparse(name), name)


@pytest.mark.filterwarnings("ignore:Level value of 3 is too high")
def test_a_wrong_filter_is_caught_though_it_is_orthonormal() -> None:
    @dataclass(frozen=True)
    class Reversed(Wavelet):
        name = "reversed"

        def matrix(self, extent: int) -> Array:
            return level_matrix(DB3[::-1].copy(), extent)

    assert np.abs(Reversed().matrix(16) @ Reversed().matrix(16).T - np.eye(16)).max() <= 1e-12
    with pytest.raises(AssertionError):
        assert_equal_to_pywavelets(Reversed(), "db3")


def test_a_wrong_cosine_is_caught_though_it_is_orthonormal() -> None:
    @dataclass(frozen=True)
    class Fourth(Dct):
        def matrix(self, extent: int) -> Array:
            return np.asarray(scipy.fft.dct(np.eye(extent), type=4, norm="ortho", axis=0))

    saved = Saved("l", (3, 16, 16))
    x = tensor("random", (2, *saved.shape))
    assert distance(sparse("dct").coefficients(x, saved), dct_by_scipy(x, saved)) <= 1e-12
    assert distance(Fourth().coefficients(x, saved), dct_by_scipy(x, saved)) > 0.1


@pytest.mark.parametrize("saved", LAYOUTS, ids=lambda saved: f"{saved.shape}{saved.channels_last}")
@pytest.mark.parametrize("name", NAMES)
def test_coefficients_equal_the_reference_and_can_be_inverted(name: str, saved: Saved) -> None:
    x, axes = tensor("random", (3, *saved.shape)), position_axes(saved)
    if name == "threshold":
        expected = x.reshape(3, -1)
    else:
        expected = dct_by_scipy(x, saved) if name == "dct" else peeled(nested(x, name, axes), axes)
    found = sparse(name).coefficients(x, saved)
    assert found.shape == expected.shape and distance(found, expected) <= 1e-12
    assert distance(sparse(name).inverse(found, saved), x) <= 1e-12
    g = GraphBuilder(taken={"x"})
    emitted = sparse(name).emit_coefficients(g, "x", saved)
    assert distance(run_graph(g, {"x": x}, [emitted])[emitted], expected) <= 1e-6


@pytest.mark.parametrize("name", ["dct", "haar", "db3"])
def test_matrices_are_orthonormal(name: str) -> None:
    for extent in (*range(2, 40), 56, 197):
        matrix = sparse(name).matrix(extent)
        assert np.abs(matrix @ matrix.T - np.eye(extent)).max() <= 1e-12


@pytest.mark.parametrize("name", ["dct", "haar"])
def test_a_constant_plane_takes_one_coefficient_where_its_extent_is_a_power_of_two(name: str) -> None:
    saved = Saved("l", (1, 8, 8))
    _, energy, decoded = run_emitted(sparse(name), tensor("constant", (2, 1, 8, 8)), saved, 1)
    assert energy == pytest.approx(1.0, abs=1e-6) and np.allclose(decoded, 1.7, rtol=1e-6)


# What is kept


@st.composite
def cases(draw: st.DrawFn) -> tuple[Array, Saved, int]:
    positions = draw(st.lists(st.sampled_from([1, 2, 3, 5, 7, 8, 13, 17]), max_size=3))
    if math.prod(positions) > 900:
        positions = positions[:2]
    channels, last = draw(st.integers(1, 6)), draw(st.booleans())
    saved = Saved("l", (*positions, channels) if last else (channels, *positions), channels_last=last)
    x = tensor(draw(st.sampled_from(KINDS)), (draw(st.integers(1, 4)), *saved.shape), draw(st.integers(0, 99)))
    n = math.prod(saved.shape)
    return x, saved, draw(st.sampled_from([1, n, max(1, n // 10), max(1, n // 2)]))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=cases())
@example(case=(tensor("huge", (1, 3, 56, 7)), Saved("l", (3, 56, 7)), 117))
def test_laws(name: str, case: tuple[Array, Saved, int]) -> None:
    codec, (x, saved, k) = sparse(name), case
    expected = codec.encode(x, saved, count(k))
    oracle = codec.decode(expected, saved, count(k))
    stored, energy, decoded = run_emitted(codec, x, saved, k)
    # What is stored, to the byte.
    for made in (stored, expected):
        assert [value.dtype for value in made.values()] == [np.float32, np.uint8]
        assert [v.nbytes for v in made.values()] == [s.bytes({"batch": len(x), "k": k}) for s in codec.stored(saved)]
    # The energy, from below and from above; of equal magnitudes nodes and oracle may keep different ones.
    assert decoded.shape == oracle.shape == x.shape
    assert energy == pytest.approx(captured_energy(x, decoded), abs=1e-5)
    assert energy == pytest.approx(captured_energy(x, oracle), abs=1e-5)
    assert -1e-6 <= energy <= 1 + 1e-6
    # What one side stored, the other decodes; all coefficients are exact.
    assert distance(decoded, codec.decode(stored, saved, count(k))) <= 1e-6
    if k == math.prod(saved.shape):
        assert distance(decoded, x) <= 1e-6 and distance(oracle, x) <= 1e-6
        assert name != "threshold" or np.array_equal(decoded, x)
    largest = np.sort(np.abs(codec.coefficients(x, saved)), axis=1)[:, -k:]
    for made in (stored, expected):
        assert distance(np.sort(np.abs(made["values"]), axis=1), largest) <= 1e-6


@pytest.mark.parametrize("saved", LAYOUTS, ids=lambda saved: f"{saved.shape}{saved.channels_last}")
@pytest.mark.parametrize("name", NAMES)
def test_without_ties_nodes_and_oracle_decode_the_same(name: str, saved: Saved) -> None:
    x, k = tensor("smooth", (3, *saved.shape), seed=5), math.prod(saved.shape) // 4
    stored, _, decoded = run_emitted(sparse(name), x, saved, k)
    expected = sparse(name).encode(x, saved, count(k))
    assert distance(decoded, sparse(name).decode(expected, saved, count(k))) <= 1e-5
    by_numpy = np.argsort(-np.abs(sparse(name).coefficients(x, saved)), axis=1)[:, :k]
    indices = stored["indices"].astype(np.int64)
    assert np.array_equal(np.sort(sum(indices[:, i] << 8 * i for i in range(indices.shape[1]))), np.sort(by_numpy))


@pytest.mark.parametrize("name", NAMES)
def test_the_torch_engine_computes_the_same_and_the_same_again(name: str) -> None:
    for saved in LAYOUTS[:5]:
        x, k = tensor("relu", (2, *saved.shape)), 9
        g = GraphBuilder(taken={"x", "k"})
        encoded = sparse(name).emit_encode(g, "x", saved, {"k": "k"})
        wanted = [*encoded.stored, str(encoded.energy), sparse(name).emit_decode(g, encoded, saved)]
        constants = {key: torch.from_numpy(value) for key, value in g.constants.items()}
        program = Program(g.nodes, ["x", "k"], wanted, constants, Setting(18, tensor_of, torch.device("cpu")))
        feeds = {"x": torch.from_numpy(x), "k": torch.tensor([k])}
        first, second = (program.run(feeds, wanted) for _ in range(2))
        assert all(torch.equal(first[key], second[key]) for key in wanted)
        _, energy, decoded = run_emitted(sparse(name), x, saved, k)
        assert distance(first[wanted[-1]].numpy(), decoded) <= 1e-5
        assert float(first[str(encoded.energy)]) == pytest.approx(energy, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_onnxruntime_gives_the_same_again_to_the_bit(name: str) -> None:
    x = tensor("duplicates", (3, 3, 7, 13))
    first, second = (run_emitted(sparse(name), x, LAYOUTS[0], 40) for _ in range(2))
    assert first[1] == second[1] and np.array_equal(first[2], second[2])
    assert all(np.array_equal(first[0][key], second[0][key]) for key in first[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_is_refused_or_shows(name: str, bad: float) -> None:
    saved = Saved("l", (8, 31, 33))
    x = tensor("random", (2, *saved.shape))
    x[1, 3, 4:9, 5:21] = bad
    with pytest.raises(DataError, match="not finite"):
        sparse(name).encode(x, saved, count(5))
    for k in (1, 400, 4000):
        _, energy, _ = run_emitted(sparse(name), x, saved, k)
        assert not math.isfinite(energy)


def test_the_energy_of_many_elements_keeps_its_digits() -> None:
    saved = Saved("l", (16, 112, 112))
    x = np.full((2, *saved.shape), 1.1, np.float32)
    x[:, :, ::3] = 0.7
    k = math.prod(saved.shape) // 3
    _, energy, decoded = run_emitted(sparse("threshold"), x, saved, k)
    assert energy == pytest.approx(captured_energy(x, decoded), rel=1e-6)


def test_an_index_of_three_bytes_reaches_every_coefficient() -> None:
    saved = Saved("l", (70000,), channels_last=True)
    x = np.zeros((1, 70000), np.float32)
    x[0, [0, 255, 256, 65535, 65536, 69999]] = [1, 2, 3, 4, 5, 6]
    stored, energy, decoded = run_emitted(sparse("threshold"), x, saved, 6)
    assert stored["indices"].shape == (1, 3, 6)
    assert energy == 1.0 and np.array_equal(decoded, x)


# What calibration and planner ask


def test_the_narrowest_index() -> None:
    sizes = [1, 256, 257, 65536, 65537, 2**24, 2**24 + 1]
    assert [index_bytes(n) for n in sizes] == [1, 1, 2, 2, 3, 3, 4]


@given(n=st.integers(1, 10**8))
def test_the_most_useful_count_is_the_last_that_saves_bytes(n: int) -> None:
    k = most_useful_count(n)
    assert k * (4 + index_bytes(n)) < 4 * n <= (k + 1) * (4 + index_bytes(n))


@given(n=st.integers(1, 10**8))
def test_the_grid_of_counts_ascends_from_one_to_the_most_useful(n: int) -> None:
    grid = count_grid(n)
    assert len(grid) <= GRID_POINTS
    if most_useful_count(n) < 1:
        assert grid == ()
    else:
        assert (grid[0], grid[-1]) == (1, most_useful_count(n))
        assert list(grid) == sorted(set(grid))


def test_applies_where_there_is_an_axis_to_transform() -> None:
    by_shape = {
        (64,): ("threshold",),
        (64, 1, 1): ("threshold",),
        (8, 7, 1): NAMES,
        (1,): (),
        (2, 8, 8, 8): NAMES,
        (2, 1024): NAMES,
        (2, 1025): ("threshold",),
    }
    for shape, names in by_shape.items():
        assert tuple(n for n in NAMES if sparse(n).applies(Saved("l", shape))) == names
    assert sparse("dct").applies(Saved("l", (50, 8), channels_last=True))
    assert not sparse("dct").applies(Saved("l", (1, 8), channels_last=True))


def test_modes_and_most_kept_tell_the_size_of_one_sample() -> None:
    saved = Saved("l", (256, 14, 14))
    for codec, name in zip(menu_from("dct+haar+db3+threshold"), NAMES, strict=True):
        assert isinstance(codec, Sparse)
        (mode,) = codec.modes(saved)
        assert (mode.letter, mode.source.value, mode.size, mode.spectrum) == ("k", "count", 50176, f"{name}.k")
        k = codec.most_kept(saved)
        sizes = [sum(s.bytes({"batch": 3, "k": k + more}) for s in codec.stored(saved)) for more in (0, 1)]
        assert sizes[0] < 3 * 50176 * 4 <= sizes[1]
