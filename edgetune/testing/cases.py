"""What codecs are tried on: shapes of saved tensors, contents, and the run-time inputs of any codec. Knows numpy only.

Everything follows from a seed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np

from edgetune.codecs.base import Array, Codec, Mode, Saved, Source

GEOMETRIES = (
    Saved("conv1d", (6, 7)),
    Saved("conv1d_grouped", (6, 5), groups=2),
    Saved("conv2d", (4, 8, 8)),
    Saved("conv2d_odd", (5, 7, 9)),
    Saved("conv2d_two_blocks", (2, 17, 33)),
    Saved("conv2d_grouped", (6, 5, 4), groups=3),
    Saved("conv2d_depthwise", (4, 5, 6), groups=4),
    Saved("conv2d_one_channel", (1, 6, 6)),
    Saved("conv2d_one_row", (6, 1, 5)),
    Saved("conv2d_one_position", (7, 1, 1)),
    Saved("conv3d", (4, 3, 4, 5)),
    Saved("conv3d_grouped", (4, 1, 4, 5), groups=2),
    Saved("conv3d_volume", (2, 9, 8, 11)),
    Saved("channels", (6,)),
    Saved("linear", (11,), channels_last=True),
    Saved("linear_one", (1,), channels_last=True),
    Saved("linear_tokens", (7, 6), channels_last=True),
    Saved("linear_tokens_one_channel", (4, 1), channels_last=True),
    Saved("linear_grid", (4, 5, 6), channels_last=True),
    Saved("linear_volume", (3, 1, 5, 6), channels_last=True),
)
"""Inputs of convolutions with one to three position axes and of linear layers with none to three; odd extents and
extents of one; samples with fewer and with more elements than a byte can index."""

LARGE = Saved("conv2d_large", (17, 64, 64))
"""More elements per sample (69,632) than two bytes can index."""

CONTENTS = ("random", "smooth", "constant", "duplicates", "one_sample_large")
EXTREMES = ("zeros", "huge", "tiny")


def tensor(content: str, saved: Saved, batch: int, seed: int) -> Array:
    """Return float32 [batch, *saved.shape]; ``content`` is one of ``CONTENTS``, ``EXTREMES``, or ``decaying``.

    ``huge`` has elements of 1e30, whose squares no float32 holds, ``tiny`` of 1e-30. Of ``decaying`` every unfolding
    has the singular values 1, 1/4, 1/16, ..., as many as the shortest mode (longer than one) has entries: so the
    leading subspaces are well defined, where elsewhere any of several may be right.
    """
    rng = np.random.default_rng(seed)
    if content == "decaying":
        return _decaying(rng, saved, batch)
    x = rng.standard_normal((batch, *saved.shape))
    if content == "smooth":
        for axis in range(1, x.ndim):
            x = np.cumsum(x, axis)
    elif content == "constant":
        x = np.full_like(x, 1.7)
    elif content == "zeros":
        x = np.zeros_like(x)
    elif content == "duplicates":
        x[:] = x[:1]
    elif content == "one_sample_large":
        x[0] *= 1e3
    elif content in ("huge", "tiny"):
        x *= {"huge": 1e30, "tiny": 1e-30}[content]
    return np.asarray(x, np.float32)


def _decaying(rng: np.random.Generator, saved: Saved, batch: int) -> Array:
    """Σ_i 4^-i · u_i ⊗ v_i ⊗ ..., the factors of each mode orthonormal; each group has channels of its own."""
    axes = [batch, *saved.extents().values()]
    terms = min([n for n in axes if n > 1], default=1)

    def factor(size: int) -> Array:
        return np.linalg.qr(rng.standard_normal((size, size)))[0][:, :terms] if size > 1 else np.ones((1, terms))

    factors = [factor(size) for size in axes]
    channel = 1 + list(saved.extents()).index("c")
    parts = []
    for _ in range(saved.groups):
        factors[channel] = factor(axes[channel])
        part = np.zeros(axes)
        for i in range(terms):
            term: Array = np.array(4.0**-i)
            for columns in factors:
                term = np.multiply.outer(term, columns[:, i])
            part += term
        parts.append(part)
    return np.concatenate(parts, axis=channel).astype(np.float32)


def full_ranks(codec: Codec, saved: Saved, batch: int) -> dict[str, int]:
    """Return the largest rank or count of every mode that has one, by letter."""
    modes = codec.modes(saved)
    return {mode.letter: batch if mode.size is None else mode.size for mode in modes if mode.ranked}


def some_ranks(codec: Codec, saved: Saved, batch: int, seed: int) -> dict[str, int]:
    """Return ranks and counts drawn from 1 up to below the full ones (a mode of extent one has no choice)."""
    rng = np.random.default_rng(seed)
    return {letter: int(rng.integers(1, max(full, 2))) for letter, full in full_ranks(codec, saved, batch).items()}


def inputs_for(
    codec: Codec, saved: Saved, batch: int, seed: int, ranks: Mapping[str, int] | None = None
) -> dict[str, Array]:
    """Return the run-time input of every mode, shaped as :class:`~edgetune.codecs.base.Source` says.

    Bases are random and orthonormal; those of a smaller rank are the first columns of those of a larger one. ``ranks``
    are by letter; None means full.
    """
    chosen = full_ranks(codec, saved, batch) | dict(ranks or {})
    return {mode.letter: _input(mode, batch, chosen, seed) for mode in codec.modes(saved)}


def _input(mode: Mode, batch: int, ranks: Mapping[str, int], seed: int) -> Array:
    size = batch if mode.size is None else mode.size
    if mode.source is Source.COUNT:
        return np.array([ranks[mode.letter]], np.int64)
    if mode.source is Source.NOISE:
        return np.random.default_rng([seed, ord(mode.letter)]).random(size, np.float32)
    rank = ranks[mode.letter]
    whole = _matrices(seed, mode.letter, size, mode.groups if mode.source is Source.BASIS else 0)
    return np.array(whole[..., :rank], np.float32, order="C")


@functools.lru_cache(maxsize=512)
def _matrices(seed: int, letter: str, size: int, groups: int) -> Array:
    """Return orthonormal matrices [groups, size, size], or a sketch [size, size] for no groups."""
    rng = np.random.default_rng([seed, ord(letter)])
    if not groups:
        return rng.standard_normal((size, size))
    return np.stack([np.linalg.qr(rng.standard_normal((size, size)))[0] for _ in range(groups)])


def symbols(codec: Codec, saved: Saved, batch: int, ranks: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return what the letters of ``stored`` stand for: ``batch``, and the rank or count by letter."""
    return {"batch": batch, **full_ranks(codec, saved, batch), **dict(ranks or {})}


def shape_of(extents: tuple[int | str, ...], values: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of a stored tensor, whose extents may be products of numbers and letters."""
    shape = []
    for extent in extents:
        product = 1
        for factor in str(extent).split("*"):
            product *= int(factor) if factor.isdigit() else values[factor]
        shape.append(product)
    return tuple(shape)
