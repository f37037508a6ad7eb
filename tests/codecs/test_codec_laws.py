"""Every codec in the table, held to the laws of codecs/base.py by the conformance kit; a new codec needs no line here.

What is true of one codec only is at the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from edgetune.autodiff.builder import OPSET, GraphBuilder
from edgetune.codecs import CODECS, Codec, Hosvd, Saved, Svd, captured_energy, codec_named, label_of
from edgetune.codecs.base import Array
from edgetune.errors import UsageError
from edgetune.testing import Check, check_codec, checks, coder_for, inputs_for, some_ranks, tensor

FEW = settings(max_examples=15, deadline=None, derandomize=True)
SUBJECTS = tuple(CODECS.values())


@pytest.mark.parametrize(
    "check", [pytest.param(check, id=f"{label_of(codec)}-{check}") for codec in SUBJECTS for check in checks(codec)]
)
def test_law(check: Check) -> None:
    check()


@st.composite
def geometries(draw: st.DrawFn) -> Saved:
    """Return what may be said of a tensor: odd sizes, linear and convolution inputs, every group count."""
    if draw(st.booleans()):
        positions = draw(st.lists(st.integers(1, 5), max_size=3))
        return Saved("layer", (*positions, draw(st.integers(1, 13))), channels_last=True)
    groups, channels = draw(st.sampled_from([(1, 1), (1, 4), (1, 5), (2, 4), (2, 6), (3, 3), (4, 4)]))
    positions = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    return Saved("layer", (channels, *positions), groups)


@pytest.mark.parametrize("codec", SUBJECTS, ids=label_of)
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much])
@given(saved=geometries(), seed=st.integers(0, 99))
def test_the_laws_hold_for_any_shape(codec: Codec, saved: Saved, seed: int) -> None:
    assume(codec.applies(saved))
    assert check_codec(codec, engines=("onnxruntime",), geometries=[saved], seed=seed) == []


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
    coded = coder_for(Svd(), "onnxruntime").encode(x.reshape(batch, *saved.shape), saved, {"b": sketch})
    singular = np.linalg.svd(x.astype(np.float64), compute_uv=False) ** 2
    best = float(singular[:rank].sum() / singular.sum())
    assert coded.energy is not None and 0.98 * best <= coded.energy <= best * (1 + 1e-5)
    assert [v.size for v in coded.stored.values()] == [batch * rank, rank * x[0].size]


@FEW
@given(
    saved=geometries(), batch=st.integers(2, 7), content=st.sampled_from(["random", "smooth", "one_sample_large"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_hosvd_keeps_no_less_than_the_hosvd_bound(saved: Saved, batch: int, content: str, seed: int) -> None:
    """De Lathauwer et al. 2000, property 10: what is lost is at most the sum of the discarded eigenvalues."""
    codec, x = Hosvd(), tensor(content, saved, batch, seed)
    wide = x.astype(np.float64)
    ranks = some_ranks(codec, saved, batch, seed) | {"b": batch}
    inputs, lost = inputs_for(codec, saved, batch, seed, ranks), 0.0
    for mode in codec.modes(saved)[1:]:
        rank = ranks[mode.letter]
        axis = 1 + list(saved.extents()).index(mode.letter)
        parts = np.split(wide, mode.groups, axis)
        rows = [np.moveaxis(part, axis, 0).reshape(mode.size or 0, -1) for part in parts]
        decompositions = [np.linalg.svd(r, full_matrices=True) for r in rows]
        inputs[mode.letter] = np.stack([u[:, :rank] for u, _, _ in decompositions]).astype(np.float32)
        lost += sum(float(np.square(s[rank:]).sum()) for _, s, _ in decompositions)
    coded = coder_for(codec, "onnxruntime").encode(x, saved, inputs)
    assert coded.energy is not None and coded.energy >= 1 - lost / float(np.square(wide).sum()) - 1e-5


def test_unknown_codec_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'zip'.*dense, .*hosvd, .*svd"):
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
    assert tuple(mode.letter for mode in Hosvd().modes(saved)) == letters
    assert tuple(mode.letter for mode in Svd().modes(saved)) == ("b",)
    assert CODECS["dense"].modes(saved) == ()


CUT = codec_named("hosvd:cut=c"), codec_named("hosvd:cut=hw"), codec_named("hosvd:cut=w,storage=log8")


@pytest.mark.parametrize("codec", CUT, ids=label_of)
def test_the_laws_hold_whichever_modes_are_cut(codec: Codec) -> None:
    assert check_codec(codec) == []


def test_hosvd_cuts_the_modes_that_it_is_told_to() -> None:
    saved = Saved("l", (6, 4, 5))
    ranks = {"batch": 8, "b": 3, "c": 2, "h": 2, "w": 2}
    shapes = {cut: [t.elements(ranks) for t in Hosvd(cut).stored(saved)] for cut in ("czhw", "c", "wh", "hc")}
    assert shapes == {"czhw": [24, 24], "c": [24, 120], "wh": [24, 72], "hc": [24, 60]}
    assert [mode.letter for mode in Hosvd("wh").modes(saved)] == ["b", "h", "w"]
    assert label_of(Hosvd("c")) == "hosvd:cut=c" and label_of(Hosvd()) == "hosvd"


@pytest.mark.parametrize("cut", ["", "b", "cc", "c h"])
def test_what_is_no_letter_of_a_mode_cannot_be_cut(cut: str) -> None:
    with pytest.raises(UsageError, match=rf"cut={cut} of the codec hosvd: .*choose among: c, h, w, z"):
        codec_named(f"hosvd:cut={cut}")


def test_more_position_axes_than_letters_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"'l' of shape \(2, 2, 2, 2, 3\) has more position axes than 3"):
        Saved("l", (2, 2, 2, 2, 3), channels_last=True).extents()


def test_the_energy_of_zeros_is_one() -> None:
    zeros = np.zeros((2, 3))
    assert captured_energy(zeros, zeros) == 1.0
    assert captured_energy(zeros, zeros + 1) == -np.inf
