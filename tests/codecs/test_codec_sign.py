"""Sign masks: packing against numpy's own, one bit per element, the emitted nodes equal to the oracle bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.autodiff.builder import GraphBuilder
from edgetune.codecs.base import Array
from edgetune.codecs.sign import POSITIVE, Interval, emit_inside, emit_pack, emit_unpack, pack, unpack
from tests.codecs.test_codec_laws import run_graph

INTERVALS = (POSITIVE, Interval(0.0, 6.0), Interval(-3.0, 3.0), Interval(-math.inf, 1.0))
SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)


def values(batch: int, shape: tuple[int, ...], seed: int) -> Array:
    """Return numbers of which some lie exactly on the bounds."""
    rng = np.random.default_rng(seed)
    return rng.choice(np.array([-4, -3, -1e-7, -0.0, 0.0, 1e-30, 1.0, 5.9, 6.0, 7.0], np.float32), (batch, *shape))


def packed_by_numpy(inside: Array) -> Array:
    """Eight planes, one after the other, of which numpy packs one element each into a byte."""
    flat = inside.reshape(len(inside), -1)
    padded = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 8)))
    planes = padded.reshape(len(flat), 8, -1)
    return np.packbits(planes, axis=1, bitorder="little")[:, 0]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(batch=st.integers(1, 4), shape=SHAPES, interval=st.sampled_from(INTERVALS), seed=st.integers(0, 99))
def test_pack_is_numpys_and_unpack_undoes_it(batch: int, shape: tuple[int, ...], interval: Interval, seed: int) -> None:
    x = values(batch, shape, seed)
    inside = (x > interval.low) & (x < interval.high)
    packed = pack(x, interval)
    assert packed.dtype == np.uint8 and packed.shape == (batch, -(-math.prod(shape) // 8))
    assert np.array_equal(packed, packed_by_numpy(inside))
    assert np.array_equal(unpack(packed, shape), inside)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(batch=st.integers(1, 4), shape=SHAPES, interval=st.sampled_from(INTERVALS), seed=st.integers(0, 99))
def test_emitted_nodes_equal_the_oracle(batch: int, shape: tuple[int, ...], interval: Interval, seed: int) -> None:
    x = values(batch, shape, seed)
    g = GraphBuilder(taken={"x"})
    packed = emit_pack(g, "x", shape, interval)
    inside = emit_unpack(g, packed, shape)
    direct = emit_inside(g, "x", interval)
    found = run_graph(g, {"x": x}, [packed, inside, direct])
    assert found[packed].dtype == np.uint8
    # The product that sums the bits leaves an axis of one, which no reader minds.
    assert np.array_equal(found[packed].reshape(batch, -1), pack(x, interval))
    expected = (x > interval.low) & (x < interval.high)
    assert np.array_equal(found[inside], expected)
    assert np.array_equal(found[direct], expected)


def test_an_interval_without_bounds_needs_no_mask() -> None:
    with pytest.raises(ValueError, match="no mask"):
        emit_inside(GraphBuilder(), "x", Interval(-math.inf, math.inf))
