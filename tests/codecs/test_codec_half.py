"""Storage as float16, of any codec: bytes, rounding, huge and tiny tensors, spelling, and weight gradients."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.autodiff.builder import GraphBuilder
from edgetune.autodiff.graph import ForwardGraph, Node
from edgetune.autodiff.rule import Kept, Stored
from edgetune.autodiff.rules import conv, linear
from edgetune.codecs import (
    CODECS,
    Codec,
    Dense,
    Encoded,
    Half,
    Hosvd,
    Int8,
    Patch,
    Recompute,
    Saved,
    Svd,
    captured_energy,
    codec_from,
    codec_named,
    identifier,
    label_of,
    menu_from,
    opened,
)  # fmt: skip
from edgetune.codecs.base import Array, config_of
from edgetune.errors import DataError, UsageError
from tests.codecs.workbench import held_as_told, noise_for, run_decoder, run_encoder, run_graph

FEW = settings(max_examples=40, deadline=None, derandomize=True)
INNER: tuple[Codec, ...] = (Dense(), Hosvd(), Svd(), Patch(), Int8())
SAVED = (Saved("l", (4, 5, 6)), Saved("l", (6, 5, 4), groups=2), Saved("l", (7, 6), channels_last=True))


def samples(saved: Saved, batch: int, seed: int, magnitude: float = 1.0) -> Array:
    x = np.cumsum(np.random.default_rng(seed).standard_normal((batch, *saved.shape)), axis=1)
    return np.asarray(x * magnitude, np.float32)


def inputs_for(codec: Codec, saved: Saved, batch: int, seed: int) -> dict[str, Array]:
    """Return bases of half the full ranks, a sketch and noise."""
    rng = np.random.default_rng(seed)
    found = noise_for(codec, saved, seed)
    for mode in codec.modes(saved):
        size = batch if mode.size is None else mode.size
        rank = max(1, size // 2)
        if mode.letter == "b":
            found["b"] = rng.standard_normal((size, rank)).astype(np.float32)
        elif mode.ranked:
            bases = [np.linalg.qr(rng.standard_normal((size, size)))[0][:, :rank] for _ in range(mode.groups)]
            found[mode.letter] = np.stack(bases).astype(np.float32)
    return found


def symbols(codec: Codec, saved: Saved, batch: int) -> dict[str, int]:
    sizes = {m.letter: batch if m.size is None else m.size for m in codec.modes(saved)}
    return {"batch": batch, **{letter: max(1, size // 2) for letter, size in sizes.items()}}


def distance(a: Array, b: Array) -> float:
    """Return ‖a - b‖ / ‖b‖."""
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))


@FEW
@given(
    inner=st.sampled_from(INNER),
    saved=st.sampled_from(SAVED),
    batch=st.integers(1, 4),
    magnitude=st.sampled_from([1.0, 1e5, 1e-12]),
)
def test_emitted_and_oracle_round_what_the_inner_codec_stores(
    inner: Codec, saved: Saved, batch: int, magnitude: float
) -> None:
    codec = Half(inner)
    x, inputs = samples(saved, batch, 1, magnitude), inputs_for(inner, saved, batch, 2)
    exact = inner.decode(inner.encode(x, saved, inputs), saved, inputs)
    expected = codec.encode(x, saved, inputs)
    assert distance(codec.decode(expected, saved, inputs), exact) < 2e-3
    stored, energy = run_encoder(codec, x, saved, inputs)
    for held in (stored, expected):
        assert held_as_told(codec, held, saved, symbols(inner, saved, batch))
    decoded = run_decoder(codec, stored, saved, inputs)
    again = codec.decode(stored, saved, inputs)
    assert np.linalg.norm(decoded - again) <= 1e-6 * np.linalg.norm(x)
    assert abs(energy - captured_energy(x, decoded)) < 1e-3


@pytest.mark.parametrize("inner", INNER, ids=lambda codec: codec.name)
def test_half_the_bytes_but_for_units_and_other_types(inner: Codec) -> None:
    for saved in SAVED:
        counts = symbols(inner, saved, 4)
        whole, half = inner.stored(saved), Half(inner).stored(saved)
        floats = [t for t in whole if t.dtype == "float32"]
        spared = sum(t.bytes(counts) // 2 for t in floats) - 4 * len(floats)
        assert sum(t.bytes(counts) for t in half) == sum(t.bytes(counts) for t in whole) - spared


@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 6e-5, 1.0, 65505.0, 1e30, 3e38])
def test_any_magnitude_keeps_eleven_bits(magnitude: float) -> None:
    saved, codec = Saved("l", (3, 40)), CODECS["fp16"]
    x = np.random.default_rng(0).uniform(-1, 1, (2, *saved.shape)).astype(np.float32) * np.float32(magnitude)
    stored, energy = run_encoder(codec, x, saved, {})
    decoded = run_decoder(codec, stored, saved, {}).astype(np.float64)
    largest = float(np.abs(x).max())
    # Numbers this small have fewer bits themselves, and one that is near the least unit has no more than 2⁻¹²⁴.
    floor = max(largest * 2.0**-38, 2.0**-138)
    assert (np.abs(decoded - x) <= np.abs(x.astype(np.float64)) * 2.0**-11 + floor).all()
    assert energy == pytest.approx(1.0, abs=1e-6)
    expected = codec.encode(x, saved, {})
    assert all(np.array_equal(stored[name], expected[name]) for name in stored)


def test_small_integers_and_zeros_are_exact() -> None:
    saved = Saved("l", (2, 1024))
    for x in (np.arange(-2048, 2048), np.zeros(4096)):
        rows = x.reshape(2, *saved.shape).astype(np.float32)
        stored, energy = run_encoder(CODECS["fp16"], rows, saved, {})
        assert np.array_equal(run_decoder(CODECS["fp16"], stored, saved, {}), rows)
        assert energy == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("inner", INNER, ids=lambda codec: codec.name)
def test_what_is_not_finite_is_refused_or_told(inner: Codec, value: float) -> None:
    saved, codec = SAVED[0], Half(inner)
    x, inputs = samples(saved, 2, 1), inputs_for(inner, saved, 2, 2)
    x[1, 2, 3, 4] = value
    with pytest.raises(DataError, match="'l' is not finite"):
        codec.encode(x, saved, inputs)
    assert not math.isfinite(run_encoder(codec, x, saved, inputs)[1])


def test_what_overflows_inside_is_refused() -> None:
    saved = SAVED[0]
    x, inputs = samples(saved, 2, 1, 1e30), inputs_for(Svd(), saved, 2, 2)
    with np.errstate(all="ignore"), pytest.raises(DataError, match="'l' is not finite"):
        Half(Svd()).encode(x, saved, inputs)


@pytest.mark.parametrize(
    ("text", "codec", "label"),
    [
        ("fp16", Half(Dense()), "fp16"),
        ("dense:storage=float16", Half(Dense()), "fp16"),
        ("dense:storage=float32", Dense(), "dense"),
        ("fp16:storage=float32", Dense(), "dense"),
        ("hosvd:storage=float16", Half(Hosvd()), "hosvd:storage=float16"),
        ("hosvd:storage=float32", Hosvd(), "hosvd"),
        ("patch:size=4,storage=float16", Half(Patch(4)), "patch:size=4,storage=float16"),
        ("int8:storage=float16", Half(Int8()), "int8:storage=float16"),
        ("recompute:storage=float32", Recompute(), "recompute"),
    ],
)
def test_storage_is_a_setting_of_every_codec(text: str, codec: Codec, label: str) -> None:
    assert codec_named(text) == codec
    assert label_of(codec) == label
    assert codec_named(label) == codec
    assert codec_from(codec.name, json.loads(json.dumps(config_of(codec)))) == codec
    assert identifier(codec).replace("_", "a").isalnum()


def test_storage_tells_codecs_apart() -> None:
    assert Half(Patch(4)) != Half(Patch(2))
    assert len({identifier(codec) for codec in menu_from("dense+fp16+hosvd+hosvd:storage=float16")}) == 4
    with pytest.raises(UsageError, match="fp16 appears twice"):
        menu_from("fp16+dense:storage=float16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hosvd:storage=float8", "storage=float8 of the codec hosvd: choose one of: .*float16, .*log8"),
        ("recompute:storage=float16", "recompute stores nothing"),
        ("hosvd:size=3", "the codec hosvd has no setting 'size'; it has: cut, storage"),
        ("patch:size=x", "size=x of the codec patch should be of the type int"),
        ("patch:edge=3", "it has: size, storage"),
        ("patch:size", "'size' in the codec 'patch:size' is no setting"),
        ("zip", "there is no codec 'zip'; choose one of: .*dense, fp16, .*hosvd"),
    ],
)
def test_wrong_settings_list_the_right_ones(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        codec_named(text)


def test_values_of_another_type_and_half_of_a_half() -> None:
    with pytest.raises(UsageError, match="storage=16 of the codec hosvd should be of the type str"):
        codec_from("hosvd", {"storage": 16})
    with pytest.raises(UsageError, match="fp16 is stored as float16 already"):
        Half(Half(Dense()))
    with pytest.raises(UsageError, match="storage=float32 of the codec dense is no half"):
        Half(Dense(), "float32")


def test_opened_leaves_other_codecs_alone() -> None:
    encoded = Encoded(("a", "b"), {}, "e")
    g = GraphBuilder()
    assert opened(g, Svd(), encoded, SAVED[0]) == (Svd(), encoded)
    assert not g.nodes


class Bench:
    """A context in which every function is written out where it is called; one option is kept of one tensor."""

    def __init__(self, g: GraphBuilder, graph: ForwardGraph, kept: Kept) -> None:
        self.g, self.graph, self._kept, self.called = g, graph, kept, list[str]()

    def stored(self, tensor: str, groups: int = 1, channels_last: bool = False) -> Kept:
        return self._kept

    def choose(self, kept: str, results: list[str], hint: str) -> str:
        (result,) = results
        return result

    def function(self, name: str, inputs: list[str], hint: str, body: Any) -> str:
        self.called.append(name)
        return str(body(self.g, inputs))


def weight_gradient(codec: Codec, saved: Saved, stored: dict[str, Array], inputs: dict[str, Array], dy: Array) -> Array:
    """Return dW as the rule of Conv or Linear emits it for what ``codec`` stored."""
    bases = {m.letter: inputs[m.letter] for m in codec.modes(saved) if m.letter != "b"}
    names = Encoded(tuple(stored), {letter: letter for letter in bases}, None)
    rows = saved.channels_last
    w_shape = (saved.channels, dy.shape[-1]) if rows else (dy.shape[1], saved.channels // saved.groups, 3, 3)
    g = GraphBuilder("grad", taken={*stored, *bases, "dy"})
    shapes = {"x": (0, *saved.shape), "w": w_shape, "y": (0, *dy.shape[1:])}
    graph = ForwardGraph([], ("x",), ("y",), {}, shapes)
    bench: Any = Bench(g, graph, Kept("l", saved, (Stored(codec, saved, names),)))
    attributes = {"transposed": 0} if rows else {"group": saved.groups, "pads": [1, 1, 1, 1]}
    node = Node("Linear" if rows else "Conv", "n", ("x", "w"), ("y",), attributes)
    rule = linear.RULES["Linear"] if rows else conv.RULES["Conv"]
    dw = rule.backward(bench, node, frozenset([1]), "dy")[1]
    (label,) = bench.called
    assert identifier(codec) in label
    return run_graph(g, {**stored, **bases, "dy": dy}, [dw])[dw]


@pytest.mark.parametrize("inner", [Hosvd(), Svd(), Patch()], ids=lambda codec: codec.name)
@pytest.mark.parametrize("saved", SAVED, ids=lambda saved: str(saved.shape))
def test_weight_gradients_in_the_factors_are_those_of_the_restored_factors(inner: Codec, saved: Saved) -> None:
    codec, rng = Half(inner), np.random.default_rng(3)
    x, inputs = samples(saved, 4, 1, 1e6), inputs_for(inner, saved, 4, 2)
    dy_shape = (4, *saved.positions, 3) if saved.channels_last else (4, 2 * saved.groups, *saved.positions)
    dy = rng.standard_normal(dy_shape).astype(np.float32)
    stored = codec.encode(x, saved, inputs)
    found = weight_gradient(codec, saved, stored, inputs, dy)
    decoded = codec.decode(stored, saved, inputs).astype(np.float32)
    expected = weight_gradient(Dense(), saved, {"value": decoded}, {}, dy)
    assert distance(found, expected) < 1e-5
    exact = inner.encode(x, saved, inputs)
    assert 1e-6 < distance(found, weight_gradient(inner, saved, exact, inputs, dy)) < 3e-3
