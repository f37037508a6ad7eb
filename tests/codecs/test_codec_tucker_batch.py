"""hosvd-exact against an SVD of every unfolding, asi against a plain loop with QR, and what both owe to every batch."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgetune.autodiff.builder import OPSET, GraphBuilder
from edgetune.codecs import CODECS, Saved, captured_energy, codec_named
from edgetune.codecs.asi import Asi
from edgetune.codecs.base import Array, Source
from edgetune.codecs.batch_tucker import BatchTucker, cut_axes
from edgetune.codecs.eigen import emit_leading_eigenvectors, leading_eigenvectors
from edgetune.codecs.hosvd_exact import HosvdExact
from edgetune.codecs.subspace import emit_orthonormal_columns, emit_unit_columns, orthonormal_columns
from edgetune.errors import DataError
from edgetune.testing import tensor
from edgetune.testing.cases import CONTENTS
from tests.codecs.test_codec_laws import run_graph

BOTH: tuple[BatchTucker, ...] = (HosvdExact(), Asi())
LAYERS = (
    Saved("a convolution", (6, 4, 5)),
    Saved("a grouped convolution", (6, 4, 5), groups=2),
    Saved("one row", (6, 1, 5)),
    Saved("a volume", (3, 4, 2, 5)),
    Saved("a sequence", (5, 7), channels_last=True),
    Saved("features", (9,), channels_last=True),
    Saved("one number", (1,), channels_last=True),
)
NAMES = [saved.name for saved in LAYERS]


def distance(a: Array, b: Array, scale: Array) -> float:
    """Return ‖a - b‖ / ‖scale‖, or ‖a - b‖ where the scale is zero."""
    norm = float(np.linalg.norm(scale.astype(np.float64)))
    return float(np.linalg.norm(a.astype(np.float64) - b.astype(np.float64))) / (norm or 1.0)


def inputs_of(codec: BatchTucker, saved: Saved, batch: int, *, share: float, seed: int = 0) -> dict[str, Array]:
    """Return sketches of ``share`` of each mode's extent, rounded up."""
    rng = np.random.default_rng(seed)
    sizes = {mode.letter: mode.size or batch for mode in codec.modes(saved)}
    return {k: rng.standard_normal((n, int(np.ceil(share * n)))).astype(np.float32) for k, n in sizes.items()}


@dataclass(frozen=True)
class Session:
    """The emitted encoder and decoder of one layer, for batches and ranks of any size."""

    runtime: onnxruntime.InferenceSession
    names: dict[str, str]
    decoded: str

    @staticmethod
    @functools.cache
    def of(codec: BatchTucker, saved: Saved) -> Session:
        """Return the session; its names are those of ``stored``, ``energy``, and ``next_<letter>``."""
        letters = [mode.letter for mode in codec.modes(saved)]
        g = GraphBuilder(taken={"x", *letters})
        encoded = codec.emit_encode(g, "x", saved, {letter: letter for letter in letters})
        assert not encoded.bases and encoded.energy is not None
        names = {t.name: name for t, name in zip(codec.stored(saved), encoded.stored, strict=True)}
        names |= {"energy": encoded.energy, **{f"next_{letter}": name for letter, name in encoded.carried.items()}}
        decoded = codec.emit_decode(g, encoded, saved)
        shapes: dict[str, list[int | str | None]] = {"x": ["b", *saved.shape]}
        shapes |= {letter: [None, None] for letter in letters}
        graph = helper.make_graph(
            g.nodes,
            "codec",
            [helper.make_tensor_value_info(k, TensorProto.FLOAT, shape) for k, shape in shapes.items()],
            [helper.make_empty_tensor_value_info(name) for name in [*names.values(), decoded]],
            [numpy_helper.from_array(value, name) for name, value in g.constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        runtime = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return Session(runtime, names, decoded)


def emitted(codec: BatchTucker, x: Array, saved: Saved, given: dict[str, Array]) -> tuple[dict[str, Array], Array]:
    """Return what the emitted encoder makes, by name, and what the emitted decoder makes of it."""
    session = Session.of(codec, saved)
    *made, decoded = session.runtime.run([*session.names.values(), session.decoded], {"x": x, **given})
    return dict(zip(session.names, made, strict=True)), decoded


def decaying(saved: Saved, batch: int, seed: int = 0) -> Array:
    """Return a batch whose spectrum falls along every mode, so that leading subspaces are well defined."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, *saved.shape))
    for axis, size in enumerate(x.shape):
        q = np.linalg.qr(rng.standard_normal((size, size)))[0]
        x = np.moveaxis(np.tensordot(q * 0.8 ** np.arange(size), x, axes=(1, axis)), 0, axis)
    return x.astype(np.float32)


def unfolded(x: Array, axis: int) -> Array:
    return np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1).astype(np.float64)


def tucker(x: Array, factors: dict[int, Array]) -> Array:
    """Return ``x`` projected on the columns of the factor of every axis."""
    decoded = x.astype(np.float64)
    for axis, u in factors.items():
        decoded = np.moveaxis(np.tensordot(u @ u.T, decoded, axes=(1, axis)), 0, axis)
    return decoded


def projector(u: Array) -> Array:
    return np.asarray(u.astype(np.float64) @ u.T.astype(np.float64))


def stored_factor(made: dict[str, Array], letter: str) -> Array:
    return made["factor" if letter == "b" else f"factor_{letter}"]


# ---- against the obvious ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", LAYERS[:-1], ids=NAMES[:-1])
def test_hosvd_exact_is_numpys_svd_of_every_unfolding(saved: Saved) -> None:
    x, codec = decaying(saved, 6), HosvdExact()
    given = inputs_of(codec, saved, 6, share=0.5)
    factors = {}
    for letter, axis in cut_axes(saved).items():
        factors[axis] = np.linalg.svd(unfolded(x, axis), full_matrices=False)[0][:, : given[letter].shape[1]]
    expected = tucker(x, factors)
    made, decoded = emitted(codec, x, saved, given)
    oracle = codec.encode(x, saved, given)
    for letter, axis in cut_axes(saved).items():
        for found in (made, oracle):
            assert np.abs(projector(stored_factor(found, letter)) - projector(factors[axis])).max() <= 1e-5
    assert distance(decoded, expected, x) <= 1e-5
    assert distance(codec.decode(oracle, saved, {}), expected, x) <= 1e-6
    assert float(made["energy"]) == pytest.approx(captured_energy(x, expected), abs=1e-6)


@pytest.mark.parametrize("saved", LAYERS[:-1], ids=NAMES[:-1])
def test_asi_is_a_plain_loop_with_qr(saved: Saved) -> None:
    codec = Asi()
    given = inputs_of(codec, saved, 6, share=0.5)
    for letter, sketch in given.items():  # so that the oracle's own rounding says nothing at the first step
        given[letter] = np.linalg.qr(sketch)[0]
    plain = dict(given)
    for step in range(4):
        x = decaying(saved, 6, seed=7) + np.float32(0.01) * decaying(saved, 6, seed=step)
        for letter, axis in cut_axes(saved).items():
            a = unfolded(x, axis)
            plain[letter] = np.linalg.qr(a @ (a.T @ plain[letter]))[0]
        expected = tucker(x, {axis: plain[letter] for letter, axis in cut_axes(saved).items()})
        made, decoded = emitted(codec, x, saved, given)
        oracle = codec.encode(x, saved, given)
        for letter in given:
            for found in (made, oracle):
                assert np.abs(projector(stored_factor(found, letter)) - projector(plain[letter])).max() <= 1e-5
            assert np.array_equal(made[f"next_{letter}"], stored_factor(made, letter))
        assert distance(decoded, expected, x) <= 1e-5
        given = {letter: made[f"next_{letter}"] for letter in given}


def test_asi_on_one_batch_comes_to_what_hosvd_exact_finds_at_once() -> None:
    saved, asi, exact = LAYERS[0], Asi(), HosvdExact()
    x, given = decaying(saved, 6), inputs_of(asi, saved, 6, share=0.5)
    first = float(emitted(asi, x, saved, given)[0]["energy"])
    for _ in range(60):
        made = emitted(asi, x, saved, given)[0]
        given = {letter: made[f"next_{letter}"] for letter in given}
    best = float(emitted(exact, x, saved, given)[0]["energy"])
    assert first < best - 1e-3
    assert float(made["energy"]) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize(("size", "rank"), [(1, 1), (2, 1), (7, 3), (40, 13), (97, 30), (97, 97)])
@pytest.mark.parametrize("kind", ["slow", "fast", "flat", "low rank", "zero", "huge"])
def test_jacobi_finds_all_the_energy_that_is_to_be_had(kind: str, size: int, rank: int) -> None:
    rng = np.random.default_rng(size)
    number = np.arange(1, size + 1)
    singular = {"slow": 1.0 / number, "fast": 3.0**-number, "flat": number**0.0, "low rank": 1.0 * (number <= 3)}
    scale = singular.get(kind, number ** (-0.5)) * {"zero": 0.0, "huge": 1e15}.get(kind, 1.0)
    x = (np.linalg.qr(rng.standard_normal((size, size)))[0] * scale) @ rng.standard_normal((size, 3 * size))
    x = x.astype(np.float32)
    g = GraphBuilder(taken={"gram", "sketch"})
    name = emit_leading_eigenvectors(g, "gram", "sketch")
    sketch = rng.standard_normal((size, rank)).astype(np.float32)
    basis = run_graph(g, {"gram": x @ x.T, "sketch": sketch}, [name])[name].astype(np.float64)
    assert np.abs(basis.T @ basis - np.eye(rank)).max() <= 2e-6
    energies = np.linalg.svd(x.astype(np.float64), compute_uv=False) ** 2
    kept = float(np.square(basis.T @ x).sum())
    assert kept >= energies[:rank].sum() - 3e-6 * energies.sum()
    # The columns come in the order of what they hold.
    each = np.square(basis.T @ x).sum(axis=1)
    assert (np.diff(each) <= 1e-5 * energies.max()).all()


@pytest.mark.parametrize("rank", [12, 64])
def test_rounding_errors_of_thousands_of_rotations_do_not_add_up(rank: int) -> None:
    """A flat spectrum has small gaps, which make the eigenvectors as sensitive as they get."""
    rng = np.random.default_rng(6)
    x = rng.standard_normal((128, 2000)).astype(np.float32)
    g = GraphBuilder(taken={"gram", "sketch"})
    name = emit_leading_eigenvectors(g, "gram", "sketch")
    sketch = rng.standard_normal((128, rank)).astype(np.float32)
    basis = run_graph(g, {"gram": x @ x.T, "sketch": sketch}, [name])[name].astype(np.float64)
    exact = leading_eigenvectors(x.astype(np.float64) @ x.T, rank)
    assert distance(basis @ (basis.T @ x), exact @ (exact.T @ x), x) <= 3e-6


def test_equal_rows_are_rotated_too() -> None:
    """Two rows of the same norm have no larger one that could say which way they turn."""
    gram = np.array([[2, 1, 0, 0], [1, 2, 0, 0], [0, 0, 1, -1], [0, 0, -1, 1]], np.float32)
    g = GraphBuilder(taken={"gram", "sketch"})
    name = emit_leading_eigenvectors(g, "gram", "sketch")
    basis = run_graph(g, {"gram": gram, "sketch": np.eye(4, dtype=np.float32)[:, :3]}, [name])[name]
    expected = np.array([[1, 0, 1], [1, 0, -1], [0, 1, 0], [0, -1, 0]]) / np.sqrt(2)
    assert np.allclose(np.abs(basis), np.abs(expected), atol=1e-6)
    assert np.allclose(basis @ np.diag([3, 2, 1]) @ basis.T, gram, atol=1e-5)


# ---- columns that depend on others --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["independent", "zero", "twice", "rank two", "dead rows"])
@pytest.mark.parametrize(("size", "rank"), [(1, 1), (5, 3), (12, 12)])
def test_a_basis_is_orthonormal_and_is_that_of_qr_where_qr_has_one(kind: str, size: int, rank: int) -> None:
    rng = np.random.default_rng(size)
    matrix = {
        "independent": rng.standard_normal((size, rank)),
        "zero": np.zeros((size, rank)),
        "twice": np.repeat(rng.standard_normal((size, 1)), rank, axis=1),
        "rank two": rng.standard_normal((size, 2)) @ rng.standard_normal((2, rank)),
        "dead rows": rng.standard_normal((size, rank)) * (np.arange(size) < 2)[:, None],
    }[kind].astype(np.float32)
    spare = np.linalg.qr(rng.standard_normal((size, rank)))[0].astype(np.float32)
    g = GraphBuilder(taken={"matrix", "spare"})
    name = emit_orthonormal_columns(g, emit_unit_columns(g, "matrix"), "spare")
    for basis in (run_graph(g, {"matrix": matrix, "spare": spare}, [name])[name], orthonormal_columns(matrix, spare)):
        assert np.abs(basis.T.astype(np.float64) @ basis - np.eye(rank)).max() <= 2e-6
        rest = matrix - basis @ (basis.T @ matrix)
        assert np.abs(rest).max() <= 1e-5 * max(np.abs(matrix).max(), 1.0)
        if kind == "independent":
            assert np.abs(projector(basis) - projector(np.linalg.qr(matrix)[0])).max() <= 1e-5


def test_columns_without_an_image_keep_the_direction_of_the_step_before() -> None:
    saved, codec = Saved("features", (8,), channels_last=True), Asi()
    given = {k: np.linalg.qr(v)[0] for k, v in inputs_of(codec, saved, 4, share=0.5).items()}
    made, _ = emitted(codec, np.zeros((4, 8), np.float32), saved, given)
    for letter, before in given.items():
        assert np.abs(made[f"next_{letter}"] - before).max() <= 1e-6


# ---- what every batch is owed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", BOTH, ids=lambda codec: codec.name)
@pytest.mark.parametrize("saved", LAYERS, ids=NAMES)
@pytest.mark.parametrize("batch", [1, 5])
def test_laws(codec: BatchTucker, saved: Saved, batch: int) -> None:
    for kind in (*CONTENTS, "zeros", "huge"):
        # 1e15: the largest power whose squares, summed, still are float32
        x = tensor("random" if kind == "huge" else kind, saved, batch, 1) * np.float32(1e15 if kind == "huge" else 1)
        for share in (1.0, 0.4):
            given = inputs_of(codec, saved, batch, share=share)
            made, decoded = emitted(codec, x, saved, given)
            oracle = codec.encode(x, saved, given)
            symbols = {"batch": batch, **{letter: sketch.shape[1] for letter, sketch in given.items()}}
            for told in codec.stored(saved):
                for found in (made[told.name], oracle[told.name]):
                    assert found.nbytes == told.bytes(symbols) and str(found.dtype) == told.dtype
            energy = float(made["energy"])
            assert energy == pytest.approx(captured_energy(x, decoded), abs=2e-6)
            assert distance(codec.decode(made, saved, {}), decoded, x) <= 1e-6
            if share == 1.0:
                assert distance(decoded, x, x) <= 2e-6
            if codec.name == "hosvd-exact" or kind in ("constant", "zeros"):
                assert energy == pytest.approx(captured_energy(x, codec.decode(oracle, saved, {})), abs=2e-6)
            for letter in given:
                u = stored_factor(made, letter).astype(np.float64)
                assert np.abs(u.T @ u - np.eye(u.shape[1])).max() <= 2e-6


@pytest.mark.parametrize("codec", BOTH, ids=lambda codec: codec.name)
def test_the_same_batch_gives_the_same_bits(codec: BatchTucker) -> None:
    saved = LAYERS[0]
    x, given = decaying(saved, 6), inputs_of(codec, saved, 6, share=0.5)
    runs = [emitted(codec, x, saved, given)[0] for _ in range(2)] + [codec.encode(x, saved, given) for _ in range(2)]
    for one, other in (runs[:2], runs[2:]):
        assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("codec", BOTH, ids=lambda codec: codec.name)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_and_the_energy_tells(codec: BatchTucker, value: float) -> None:
    saved = LAYERS[0]
    x, given = decaying(saved, 6), inputs_of(codec, saved, 6, share=0.5)
    x[2, 3, 1, 1] = value
    with pytest.raises(DataError, match="'a convolution' is not finite"):
        codec.encode(x, saved, given)
    made = emitted(codec, x, saved, given)[0]
    assert not np.isfinite(made["energy"])
    # What the next step starts from is finite, so that it can find a basis again.
    carried = {letter: made[f"next_{letter}"] for letter in given if f"next_{letter}" in made}
    assert list(carried) == (list(given) if codec.source is Source.CARRIED else [])
    again = emitted(codec, decaying(saved, 6), saved, given | carried)[0]
    assert 0.1 < again["energy"] < 1.0


@pytest.mark.parametrize(
    ("saved", "letters"),
    [
        (LAYERS[0], "bchw"),
        (LAYERS[1], "bhw"),
        (LAYERS[2], "bcw"),
        (LAYERS[3], "bczhw"),
        (LAYERS[4], "bwc"),
        (LAYERS[5], "bc"),
        (LAYERS[6], "b"),
        (Saved("depthwise", (4, 1, 4, 5), groups=4), "bhw"),
    ],
)
def test_which_modes_are_cut(saved: Saved, letters: str) -> None:
    for codec, source in zip(BOTH, (Source.SKETCH, Source.CARRIED), strict=True):
        modes = codec.modes(saved)
        assert "".join(mode.letter for mode in modes) == letters
        assert all(mode.source is source and mode.groups == 1 and mode.spectrum == mode.letter for mode in modes)
        assert [mode.size for mode in modes] == [None, *(saved.extents()[letter] for letter in letters[1:])]


def test_they_are_in_the_table() -> None:
    assert CODECS["hosvd-exact"] == HosvdExact() == codec_named("hosvd-exact")
    assert CODECS["asi"] == Asi() == codec_named("asi")
    assert HosvdExact().lossy and Asi().lossy


@pytest.mark.parametrize("name", ["hosvd", "svd"])
def test_huge_activations_have_the_subspace_of_ordinary_ones(name: str) -> None:
    """Images of the basis grow with the fourth power of the activation, and their squares must not overflow."""
    saved, codec, rng = Saved("layer", (6, 4, 5)), CODECS[name], np.random.default_rng(3)
    x = decaying(saved, 6)
    given = {mode.letter: np.eye(mode.size or 1, dtype=np.float32)[None] for mode in codec.modes(saved)}
    given["b"] = rng.standard_normal((6, 3)).astype(np.float32)
    energies = []
    for scale in (1.0, 1e15):
        g = GraphBuilder(taken={"x", *given})
        encoded = codec.emit_encode(g, "x", saved, {letter: letter for letter in given})
        assert encoded.energy is not None
        energies.append(float(run_graph(g, {"x": x * np.float32(scale), **given}, [encoded.energy])[encoded.energy]))
    assert energies[1] == pytest.approx(energies[0], abs=1e-5)
    best = np.linalg.svd(unfolded(x, 0), compute_uv=False) ** 2
    assert energies[0] >= 0.95 * best[:3].sum() / best.sum()
