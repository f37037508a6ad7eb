"""patch: means of patches against a plain loop, edge patches over what is there, the emitted nodes as the oracle."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.codecs import Patch, Saved, captured_energy, codec_named
from edgetune.codecs.base import Array
from edgetune.errors import DataError, UsageError
from tests.codecs.workbench import held_as_told, run_decoder, run_encoder

FEW = settings(max_examples=60, deadline=None, derandomize=True)
SAVED = (
    Saved("l", (6, 7)),
    Saved("l", (4, 8, 8)),
    Saved("l", (6, 5, 9), groups=3),
    Saved("l", (3, 1, 5)),
    Saved("l", (2, 3, 4, 5)),
    Saved("l", (7, 6), channels_last=True),
    Saved("l", (4, 5, 6), channels_last=True),
    Saved("l", (3, 4, 5, 2), channels_last=True),
)


def by_a_loop(x: Array, saved: Saved, size: int) -> Array:
    """Replace every patch of every sample by its mean, patch by patch."""
    found = np.empty(x.shape)
    first = 1 if saved.channels_last else 2
    starts = [range(0, n, size) for n in saved.positions]
    for corner in itertools.product(*starts):
        window = (*[slice(None)] * first, *(slice(start, start + size) for start in corner))
        axes = tuple(range(first, first + len(corner)))
        found[window] = x[window].astype(np.float64).mean(axis=axes, keepdims=True)
    return found


@FEW
@given(saved=st.sampled_from(SAVED), size=st.integers(2, 7), batch=st.integers(1, 3))
def test_oracle_and_emitted_nodes_are_a_plain_loop(saved: Saved, size: int, batch: int) -> None:
    codec = Patch(size)
    x = np.random.default_rng(size).standard_normal((batch, *saved.shape)).astype(np.float32)
    expected = by_a_loop(x, saved, size)
    exact = codec.encode(x, saved, {})
    np.testing.assert_allclose(codec.decode(exact, saved, {}), expected, atol=1e-5)
    stored, energy = run_encoder(codec, x, saved, {})
    np.testing.assert_allclose(stored["means"], exact["means"], atol=1e-5)
    assert held_as_told(codec, stored, saved, {"batch": batch})
    decoded = run_decoder(codec, stored, saved, {})
    assert np.array_equal(decoded, codec.decode(stored, saved, {}))
    assert energy == pytest.approx(captured_energy(x, decoded), abs=1e-5)


@pytest.mark.parametrize("size", range(2, 12))
def test_repeating_hits_the_right_patch_at_every_position(size: int) -> None:
    """The emitted decoder divides positions by the size in floating point."""
    codec, saved = Patch(size), Saved("l", (1, 3, 500))
    means = np.arange(-(-3 // size) * -(-500 // size), dtype=np.float32).reshape(1, 1, -(-3 // size), -1)
    decoded = run_decoder(codec, {"means": means}, saved, {})
    assert np.array_equal(decoded, codec.decode({"means": means}, saved, {}))
    assert np.array_equal(decoded[0, 0, 0], np.arange(500) // size)


def test_what_is_constant_on_patches_is_kept_whole() -> None:
    saved = Saved("l", (2, 5, 6))
    rows = np.random.default_rng(0).integers(-9, 9, (3, 2, 3, 3)).astype(np.float32)
    x = np.repeat(np.repeat(rows, 2, axis=2), 2, axis=3)[:, :, :5]
    stored, energy = run_encoder(Patch(2), x, saved, {})
    assert np.array_equal(stored["means"], rows)
    assert np.array_equal(run_decoder(Patch(2), stored, saved, {}), x)
    assert energy == pytest.approx(1.0, abs=1e-6)


def test_it_applies_where_there_are_positions() -> None:
    assert all(Patch().applies(saved) for saved in SAVED)
    for saved in (Saved("l", (6,)), Saved("l", (6,), channels_last=True), Saved("l", (6, 1, 1))):
        assert not Patch().applies(saved)


def test_a_mode_shorter_than_a_patch_is_one_patch() -> None:
    saved = Saved("l", (4, 3, 9))
    (told,) = Patch(7).stored(saved)
    assert told.shape == ("batch", 4, 1, 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_or_told(value: float) -> None:
    saved = Saved("l", (2, 4, 4))
    x = np.ones((2, *saved.shape), np.float32)
    x[0, 1, 2, 3] = value
    with pytest.raises(DataError, match="'l' is not finite"):
        Patch().encode(x, saved, {})
    assert not math.isfinite(run_encoder(Patch(), x, saved, {})[1])


def test_a_patch_of_one_position_is_an_error() -> None:
    with pytest.raises(UsageError, match="size=1 of the codec patch is too small"):
        codec_named("patch:size=1")
