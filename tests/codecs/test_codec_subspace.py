"""The factor of the batch mode: orthonormal whatever the spectrum, and close to the best subspace of its rank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.autodiff.builder import GraphBuilder
from edgetune.codecs.base import Array
from edgetune.codecs.subspace import EVEN, POLAR, WEAKEST, emit_top_subspace, top_subspace
from tests.codecs.test_codec_laws import run_graph

DECAYS = ("flat", "slow", "fast", "cliff", "rank_one", "zero")


def gram_of(kind: str, size: int, seed: int) -> Array:
    """Return a symmetric matrix [size, size] whose eigenvalues decay as ``kind`` says."""
    rng = np.random.default_rng(seed)
    values = {
        "flat": np.ones(size),
        "slow": 1.0 / (1.0 + np.arange(size)) ** 2,
        "fast": 10.0 ** -np.arange(size, dtype=float),
        "cliff": np.where(np.arange(size) < 2, 1.0, 1e-12),
        "rank_one": np.where(np.arange(size) < 1, 1e4, 0.0),
        "zero": np.zeros(size),
    }[kind]
    q = np.linalg.qr(rng.standard_normal((size, size)))[0]
    return np.asarray((q * values) @ q.T, np.float32)


def emitted(gram: Array, sketch: Array) -> Array:
    g = GraphBuilder(taken={"gram", "sketch"})
    name = emit_top_subspace(g, "gram", "sketch")
    return run_graph(g, {"gram": gram, "sketch": sketch}, [name])[name]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(kind=st.sampled_from(DECAYS), size=st.integers(1, 16), part=st.floats(0, 1), seed=st.integers(0, 99))
def test_orthonormal_whatever_the_spectrum(kind: str, size: int, part: float, seed: int) -> None:
    rank = max(1, round(part * size))
    sketch = np.random.default_rng(seed + 1).standard_normal((size, rank)).astype(np.float32)
    gram = gram_of(kind, size, seed)
    for basis in (emitted(gram, sketch), top_subspace(gram, sketch)):
        assert basis.shape == (size, rank)
        assert np.abs(basis.T.astype(np.float64) @ basis - np.eye(rank)).max() <= 1e-5


@pytest.mark.parametrize("kind", ["slow", "fast", "cliff", "rank_one"])
@pytest.mark.parametrize("size", [4, 9, 32])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_within_two_percent_of_the_best_subspace(kind: str, size: int, rank: int) -> None:
    gram = gram_of(kind, size, seed=size)
    rng = np.random.default_rng(5)
    values = np.linalg.eigvalsh(gram.astype(np.float64))[::-1]
    best = float(values[:rank].sum())
    # A single sketch may be unlucky, and every step draws a new one: the median of a few is what a run sees.
    sketches = [rng.standard_normal((size, rank)).astype(np.float32) for _ in range(7)]
    for subspace in (emitted, top_subspace):
        bases = [subspace(gram, sketch).astype(np.float64) for sketch in sketches]
        kept = [float(np.trace(basis.T @ gram @ basis)) for basis in bases]
        assert np.median(kept) >= 0.98 * best


@pytest.mark.parametrize("kind", ["fast", "cliff", "rank_one", "zero"])
@pytest.mark.parametrize(("size", "rank"), [(3, 3), (64, 64), (64, 60), (100, 100)])
def test_orthonormal_where_the_batch_determines_few_directions(kind: str, size: int, rank: int) -> None:
    gram = gram_of(kind, size, seed=1)
    for seed in range(3):  # square sketches are ill-conditioned now and then
        sketch = np.random.default_rng(seed).standard_normal((size, rank)).astype(np.float32)
        basis = emitted(gram, sketch).astype(np.float64)
        assert np.abs(basis.T @ basis - np.eye(rank)).max() <= 5e-6
        expected = top_subspace(gram, sketch)
        kept, best = np.trace(basis.T @ gram @ basis), np.trace(expected.T @ gram @ expected)
        assert kept == pytest.approx(best, rel=2e-4, abs=1e-12)


def test_every_singular_value_from_the_weakest_on_becomes_one() -> None:
    values = np.geomspace(WEAKEST, 1.0, 20_001)
    for i, (a, b, c) in enumerate(POLAR):
        values = a * values + b * values**3 + c * values**5
        if i + 1 == EVEN:
            assert values.min() >= 0.1 and values.max() <= 2.0
    assert np.abs(values - 1.0).max() <= 1e-6
