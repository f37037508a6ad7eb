"""The laws of codecs/base.py, for every codec in the table; a new codec needs no line here."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from edgetune.autodiff.builder import OPSET, GraphBuilder
from edgetune.codecs import CODECS, Codec, Saved, captured_energy, codec_named
from edgetune.codecs.base import Array
from edgetune.errors import UsageError

FEW = settings(max_examples=15, deadline=None, derandomize=True)
KINDS = ("random", "smooth", "constant", "zeros", "duplicates", "one_sample_large")


@st.composite
def cases(draw: st.DrawFn) -> tuple[Array, Saved]:
    """A batch and what is said of it: odd sizes, batch 1, linear and convolution inputs, every group count."""
    batch = draw(st.integers(1, 7))
    if draw(st.booleans()):
        positions = draw(st.lists(st.integers(1, 5), max_size=3))
        saved = Saved("layer", (*positions, draw(st.integers(1, 13))), channels_last=True)
    else:
        groups, channels = draw(st.sampled_from([(1, 1), (1, 4), (1, 5), (2, 4), (2, 6), (3, 3), (4, 4)]))
        positions = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
        saved = Saved("layer", (channels, *positions), groups)
    kind, seed = draw(st.sampled_from(KINDS)), draw(st.integers(0, 2**16))
    return tensor(kind, (batch, *saved.shape), seed), saved


def tensor(kind: str, shape: tuple[int, ...], seed: int) -> Array:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if kind == "smooth":
        for axis in range(1, len(shape)):
            x = np.cumsum(x, axis)
    elif kind == "constant":
        x = np.full(shape, 1.7)
    elif kind == "zeros":
        x = np.zeros(shape)
    elif kind == "duplicates":
        x[:] = x[:1]
    elif kind == "one_sample_large":
        x[0] *= 1e3
    return x.astype(np.float32)


def extents(codec: Codec, saved: Saved, batch: int) -> dict[str, tuple[int, int]]:
    """Return (groups, size) of every mode that gets a rank."""
    sizes = {letter: (1, n) for letter, n in {"b": batch, **saved.extents()}.items()}
    sizes["c"] = (saved.groups, sizes["c"][1])
    return {letter: sizes[letter] for letter in codec.letters(saved)}


def bases_for(codec: Codec, saved: Saved, batch: int, seed: int, *, full: bool) -> dict[str, Array]:
    """Return random orthonormal bases [g, n, r] and the sketch [b, r]; ranks full, or drawn."""
    rng = np.random.default_rng(seed)
    bases = {}
    for letter, (groups, size) in extents(codec, saved, batch).items():
        rank = size if full else int(rng.integers(1, size + 1))
        if letter == "b":
            bases[letter] = rng.standard_normal((batch, rank)).astype(np.float32)
        else:
            matrices = [np.linalg.qr(rng.standard_normal((size, size)))[0][:, :rank] for _ in range(groups)]
            bases[letter] = np.stack(matrices).astype(np.float32)
    return bases


def double(arrays: dict[str, Array]) -> dict[str, Array]:
    return {name: value.astype(np.float64) for name, value in arrays.items()}


def run_emitted(codec: Codec, x: Array, saved: Saved, bases: dict[str, Array]) -> tuple[list[Array], float, Array]:
    """Run the emitted encoder and decoder in onnxruntime; return what is stored, the energy, and the decoded tensor."""
    g = GraphBuilder(taken={"x"})
    names = {letter: g.fresh(f"basis.{letter}") for letter in bases}
    encoded = codec.emit_encode(g, "x", saved, names)
    decoded = codec.emit_decode(g, encoded, saved)
    wanted = list(dict.fromkeys([*encoded.stored, *([encoded.energy] if encoded.energy else []), decoded]))
    feeds = {"x": x, **{names[letter]: value for letter, value in bases.items()}}
    if wanted == ["x"]:
        return [x], 1.0, x  # nothing is emitted
    found = run_graph(g, feeds, wanted)
    energy = float(found[encoded.energy]) if encoded.energy else 1.0
    return [found[name] for name in encoded.stored], energy, found[decoded]


def run_graph(g: GraphBuilder, feeds: dict[str, Array], wanted: list[str]) -> dict[str, Array]:
    inputs = [
        helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in feeds.items()
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in wanted]
    constants = [numpy_helper.from_array(value, name) for name, value in g.constants.items()]
    graph = helper.make_graph(g.nodes, "codec", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    taken: dict[str, Any] = {i.name: feeds[i.name] for i in session.get_inputs()}
    return dict(zip(wanted, session.run(wanted, taken), strict=True))


def distance(a: Array, b: Array, scale: Array) -> float:
    """Return ‖a - b‖ / ‖scale‖, or ‖a - b‖ where the scale is zero."""
    norm = float(np.linalg.norm(scale.astype(np.float64)))
    return float(np.linalg.norm(a.astype(np.float64) - b.astype(np.float64))) / (norm or 1.0)


@pytest.mark.parametrize("name", CODECS)
@FEW
@given(case=cases(), seed=st.integers(0, 99))
def test_law_1_the_round_trip_keeps_the_shape_and_at_full_rank_the_values(
    name: str, case: tuple[Array, Saved], seed: int
) -> None:
    codec, (x, saved) = CODECS[name], case
    for full in (True, False):
        bases = double(bases_for(codec, saved, len(x), seed, full=full))
        wide = x.astype(np.float64)
        decoded = codec.decode(codec.encode(wide, saved, bases), saved, bases)
        assert decoded.shape == x.shape
        if full or not codec.lossy:
            assert distance(decoded, wide, wide) <= (1e-6 if codec.lossy else 0.0)


@pytest.mark.parametrize("name", CODECS)
@FEW
@given(case=cases(), seed=st.integers(0, 99))
def test_law_2_the_energy_is_that_of_the_decoded_tensor(name: str, case: tuple[Array, Saved], seed: int) -> None:
    codec, (x, saved) = CODECS[name], case
    bases = bases_for(codec, saved, len(x), seed, full=False)
    _, energy, decoded = run_emitted(codec, x, saved, bases)
    assert energy == pytest.approx(captured_energy(x, decoded), rel=1e-5, abs=1e-5)
    assert -1e-5 <= energy <= 1 + 1e-5


@pytest.mark.parametrize("name", CODECS)
@FEW
@given(case=cases(), seed=st.integers(0, 99), full=st.booleans())
def test_law_3_the_emitted_nodes_compute_what_the_oracle_does(
    name: str, case: tuple[Array, Saved], seed: int, full: bool
) -> None:
    codec, (x, saved) = CODECS[name], case
    bases = bases_for(codec, saved, len(x), seed, full=full)
    stored, _, decoded = run_emitted(codec, x, saved, bases)
    expected = codec.encode(x, saved, bases)
    assert [value.shape for value in stored] == [value.shape for value in expected.values()]
    # What one side stored, the other decodes.
    again = codec.decode(dict(zip(expected, stored, strict=True)), saved, bases)
    assert distance(decoded, again, x) <= 1e-5
    if full:
        assert distance(decoded, x, x) <= 1e-5


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(11,), (5, 12), (5, 6, 7), (3, 4, 2, 6)])
def test_law_3_with_a_decaying_spectrum_the_decoded_tensors_agree(
    name: str, shape: tuple[int, ...], last: bool
) -> None:
    """Where the spectrum decays the batch mode's subspace is well defined; otherwise any of several is right."""
    rng, codec, saved = np.random.default_rng(3), CODECS[name], Saved("layer", shape, channels_last=last)
    x = decaying_rows(rng, 6, math.prod(shape)).reshape(6, *shape)
    bases = bases_for(codec, saved, 6, seed=2, full=True)
    if "b" in bases:
        bases["b"] = bases["b"][:, :3]
    _, _, decoded = run_emitted(codec, x, saved, bases)
    oracle = codec.decode(codec.encode(x, saved, bases), saved, bases)
    assert distance(decoded, oracle, x) <= 1e-4


def decaying_rows(rng: np.random.Generator, rows: int, columns: int) -> Array:
    """Return [rows, columns] float32 with the singular values 1, 1/10, 1/100, ..."""
    count = min(rows, columns)
    left = np.linalg.qr(rng.standard_normal((rows, count)))[0]
    right = np.linalg.qr(rng.standard_normal((columns, count)))[0]
    return np.asarray((left * 10.0 ** -np.arange(count)) @ right.T, np.float32)


@FEW
@given(batch=st.integers(2, 8), channels=st.integers(1, 5), size=st.integers(2, 6), rank=st.integers(1, 4))
@example(batch=8, channels=1, size=2, rank=4)
def test_svd_captures_what_numpys_svd_does(batch: int, channels: int, size: int, rank: int) -> None:
    rank = min(rank, batch, channels * size * size)
    x = decaying_rows(np.random.default_rng(batch), batch, channels * size * size)
    saved = Saved("layer", (channels, size, size))
    sketch = np.random.default_rng(1).standard_normal((batch, rank)).astype(np.float32)
    stored, energy, _ = run_emitted(CODECS["svd"], x.reshape(batch, *saved.shape), saved, {"b": sketch})
    singular = np.linalg.svd(x.astype(np.float64), compute_uv=False) ** 2
    best = float(singular[:rank].sum() / singular.sum())
    assert 0.98 * best <= energy <= best * (1 + 1e-5)
    assert [v.size for v in stored] == [batch * rank, rank * x[0].size]


@FEW
@given(case=cases(), seed=st.integers(0, 99))
def test_hosvd_keeps_no_less_than_the_hosvd_bound(case: tuple[Array, Saved], seed: int) -> None:
    """De Lathauwer et al. 2000, property 10: what is lost is at most the sum of the discarded eigenvalues."""
    codec, (x, saved) = CODECS["hosvd"], case
    assume(float(np.abs(x).max()) > 0 and len(x) > 1)
    rng = np.random.default_rng(seed)
    bases, lost = {}, 0.0
    wide = x.astype(np.float64)
    total = float(np.square(wide).sum())
    for letter, (groups, size) in extents(codec, saved, len(x)).items():
        rank = int(rng.integers(1, size + 1))
        if letter == "b":
            bases["b"] = rng.standard_normal((len(x), size)).astype(np.float32)
            continue
        axis = 1 + list(saved.extents()).index(letter)
        parts = np.split(wide, groups, axis) if letter == "c" else [wide]
        rows = [np.moveaxis(part, axis, 0).reshape(size, -1) for part in parts]
        decompositions = [np.linalg.svd(r, full_matrices=True) for r in rows]
        bases[letter] = np.stack([u[:, :rank] for u, _, _ in decompositions]).astype(np.float32)
        lost += sum(float(np.square(s[rank:]).sum()) for _, s, _ in decompositions)
    _, energy, _ = run_emitted(codec, x, saved, bases)
    assert energy >= 1 - lost / total - 1e-5


def test_unknown_codec_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'zip'.*dense, hosvd, svd"):
        codec_named("zip")


@pytest.mark.parametrize(
    ("saved", "letters"),
    [
        (Saved("l", (6,)), ("b", "c")),
        (Saved("l", (6, 4, 5)), ("b", "c", "h", "w")),
        (Saved("l", (6, 4, 5), groups=2), ("b", "c", "h", "w")),
        (Saved("l", (6, 4, 5), groups=6), ("b", "h", "w")),
        (Saved("l", (6, 1, 5)), ("b", "c", "w")),
        (Saved("l", (6, 1, 1)), ("b", "c")),
        (Saved("l", (6, 5)), ("b", "c", "w")),
        (Saved("l", (6, 3, 4, 5)), ("b", "c", "z", "h", "w")),
        (Saved("l", (6, 1, 4, 5), groups=6), ("b", "h", "w")),
        (Saved("l", (6,), channels_last=True), ("b", "c")),
        (Saved("l", (5, 6), channels_last=True), ("b", "w", "c")),
        (Saved("l", (4, 5, 6), channels_last=True), ("b", "h", "w", "c")),
        (Saved("l", (3, 1, 5, 6), channels_last=True), ("b", "z", "w", "c")),
        (Saved("l", (4, 1), channels_last=True), ("b", "w")),
    ],
)
def test_hosvd_cuts_no_mode_that_is_one_long(saved: Saved, letters: tuple[str, ...]) -> None:
    assert CODECS["hosvd"].letters(saved) == letters
    assert CODECS["svd"].letters(saved) == ("b",)
    assert CODECS["dense"].letters(saved) == ()


def test_more_position_axes_than_letters_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"'l' of shape \(2, 2, 2, 2, 3\) has more position axes than 3"):
        Saved("l", (2, 2, 2, 2, 3), channels_last=True).extents()


def test_the_energy_of_zeros_is_one() -> None:
    zeros = np.zeros((2, 3))
    assert captured_energy(zeros, zeros) == 1.0
    for name in ("hosvd", "svd"):
        saved = Saved("layer", (4, 3, 3))
        x = np.zeros((2, 4, 3, 3), np.float32)
        _, energy, decoded = run_emitted(CODECS[name], x, saved, bases_for(CODECS[name], saved, 2, 0, full=False))
        assert energy == 1.0 and not decoded.any()
